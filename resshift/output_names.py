"""Where the output of an input goes, and in which format: a function of the input's key and the options
alone.
"""

from __future__ import annotations

import functools
import posixpath
import re
import string
from typing import Literal

from resshift.images import Format

OutputFormat = Literal["keep", "png", "jpeg", "webp", "tiff", "avif", "jxl"]
RECORDS = "_resshift"  # directory of a bulk job's own records, below its target
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
_TAKEN = re.compile(r"\(+(empty|dot|dot-dot)\)+")
_FIELDS = ("dir", "name", "stem", "ext", "scale")
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


def format_name(text: str) -> str:
    """Return a format as this package calls it, for a name or an extension: `jpg` is jpeg, `.tif` is tiff.
    Anything else is returned as it is.
    """
    return _KEPT.get(text.removeprefix(".").lower(), text)


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
            (the same without extension), {ext} and {scale} in it, and nothing more in braces: templates come
            over HTTP, and a format specification of 20 characters makes a name of gigabytes.
        format: Format of the output.
        scale: Sides of the output over sides of the input.

    Raises:
        ValueError: The template uses an unknown field, or leads out of DST or into the job's own records. The
            message begins with the template.
    """
    pieces = _pieces(template)
    *directories, name = key.split("/")
    fields = {
        "": "",
        "dir": "/".join(map(_part, directories)) or ".",
        "name": _part(name),
        "stem": _part(posixpath.splitext(name)[0]),
        "ext": output_format(key, format)[1],
        "scale": f"{scale:g}",
    }
    output = posixpath.normpath("".join([text + fields[field] for text, field in pieces]))
    if output.split("/")[0] in ("", "..", ".", RECORDS):
        raise ValueError(
            f"{template!r} gives {output!r}: it must lie inside the target and outside {RECORDS}/"
        )
    return output


def _part(part: str) -> str:
    """Return what a part of a key is called in an output; parts that differ are called differently."""
    return f"({part})" if _TAKEN.fullmatch(part) else _PARTS.get(part, part)


@functools.lru_cache(maxsize=16)
def _pieces(template: str) -> tuple[tuple[str, str], ...]:
    """Return the texts of a template, each with the field behind it, or with "" at the end.

    Raises:
        ValueError: Braces hold something else than the name of a field.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{template[:80]!r} is no template: {error}") from None
    for _, field, specification, conversion in parsed:
        if field is not None and (field not in _FIELDS or specification or conversion):
            shown = field + (f"!{conversion}" if conversion else "") + (":..." if specification else "")
            allowed = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise ValueError(f"{template[:80]!r} uses {{{shown[:40]}}}; allowed: {allowed}")
    return tuple((text, field or "") for text, field, _, _ in parsed)
