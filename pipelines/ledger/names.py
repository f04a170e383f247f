"""Where the output of an input goes, and in which format: a function of the input's key and the options
alone.
"""

from __future__ import annotations

import posixpath
from typing import Literal

from pipelines.ledger.ledger import DIRECTORY
from resshift.images import Format

OutputFormat = Literal["keep", "png", "jpeg", "webp", "tiff", "avif", "jxl"]
CONTENT_TYPES: dict[Format, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "tiff": "image/tiff",
    "avif": "image/avif",
    "jxl": "image/jxl",
}
_EXTENSIONS: dict[Format, str] = {
    "png": "png",
    "jpeg": "jpg",
    "webp": "webp",
    "tiff": "tif",
    "avif": "avif",
    "jxl": "jxl",
}
# Parts of keys of a bucket that no directory can be called: other names keep their outputs apart.
_PARTS = {"": "(empty)", ".": "(dot)", "..": "(dot-dot)"}
_KEPT: dict[str, Format] = {
    "png": "png",
    "jpg": "jpeg",
    "jpeg": "jpeg",
    "webp": "webp",
    "tif": "tiff",
    "tiff": "tiff",
    "avif": "avif",
    "jxl": "jxl",
}


def output_format(key: str, format: OutputFormat) -> tuple[Format, str]:
    """Return the format of an output and its extension.

    "keep" takes both from the extension of the input, whatever its content: the name must be known before the
    file is read. Inputs with another extension (HEIC, GIF, BMP, none) become PNG.
    """
    if format != "keep":
        return format, _EXTENSIONS[format]
    extension = posixpath.splitext(key)[1].removeprefix(".")
    kept = _KEPT.get(extension.lower())
    return ("png", "png") if kept is None else (kept, extension)


def output_key(key: str, template: str, format: OutputFormat, scale: float) -> str:
    """Return the key of the output of an input, relative to DST.

    Args:
        key: Key of the input, relative to SRC.
        template: Name with {dir} (the key up to its last part), {name} (the last part of the key), {stem}
            (the same without extension), {ext} and {scale} in it.
        format: Format of the output.
        scale: Sides of the output over sides of the input.

    Raises:
        ValueError: The template uses an unknown field, or leads out of DST or into the job's own records. The
            message begins with the template.
    """
    *directories, name = key.split("/")
    stem = posixpath.splitext(name)[0] or name
    fields = {
        "dir": "/".join(_PARTS.get(part, part) for part in directories) or ".",
        "name": name,
        "stem": stem,
        "ext": output_format(key, format)[1],
        "scale": f"{scale:g}",
    }
    try:
        output = posixpath.normpath(template.format(**fields))
    except (KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{template!r} uses {error}; allowed: {{dir}}, {{name}}, {{stem}}, {{ext}}, {{scale}}"
        ) from None
    if output.split("/")[0] in ("", "..", ".", DIRECTORY):
        raise ValueError(
            f"{template!r} gives {output!r}: it must lie inside the target and outside {DIRECTORY}/"
        )
    return output
