"""HTML pages, each one file that loads nothing, from Jinja2 templates beside the code that fills them in.

Markup is in the templates alone (`base.html`, `macros.html` and a page's own); every value is escaped, and
one that is missing is an error. Pictures are data: URIs. A content security policy allows these, and the
page's own style and script, named by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Embedded:
    """A picture ready for an <img>.

    Fields:
        uri: The encoded picture as a data: URI.
        width, height: Size in pixels at which a browser shows it.
    """

    uri: str
    width: int
    height: int

    @property
    def size(self) -> str:
        return f"{self.width} × {self.height}"


def embed(encoded: bytes, mime: str, width: int, height: int) -> Embedded:
    """Return an encoded picture, unchanged, for use in a page."""
    return Embedded(f"data:{mime};base64,{base64.b64encode(encoded).decode()}", width, height)


def render(template: str, **values: Any) -> str:
    """Return a page; write it as UTF-8.

    Args:
        template: Path of a template below `pipelines`, for example "evaluation/page.html".
        values: What the template names.

    Raises:
        UndefinedError: The template names a value that is not given.
    """
    return _ENVIRONMENT.get_template(template).render(security_policy=_security_policy, **values)


def _security_policy(style: str, script: str) -> Markup:
    """Return the policy that allows this style, this script if there is one, embedded pictures, and nothing
    else.
    """
    sources = "".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'; "
        for tag, content in (("style", style), ("script", script))
        if content
    )
    return Markup(f"default-src 'none'; img-src data:; {sources}base-uri 'none'; form-action 'none'")


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
