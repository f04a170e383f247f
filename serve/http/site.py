"""The page at `/` and the description of the API at `/docs`: a few static files, nothing from other servers.

The policy lets a page load scripts, styles and pictures from here and nothing from anywhere else.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from fastapi import APIRouter, Request, Response

from serve.http.problems import Problem

router = APIRouter(include_in_schema=False)
_ROOT = Path(__file__).parents[1] / "static"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@functools.cache
def _file(name: str) -> tuple[bytes, str, str]:
    path = _ROOT / name
    data = path.read_bytes()
    return data, _TYPES[path.suffix], f'"{hashlib.sha256(data).hexdigest()[:32]}"'


@functools.cache
def _names() -> frozenset[str]:
    return frozenset(path.name for path in _ROOT.iterdir() if path.suffix in _TYPES)


def _answer(request: Request, name: str) -> Response:
    data, content_type, tag = _file(name)
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers | {"Content-Type": content_type})


@router.head("/")
@router.get("/")
async def page(request: Request) -> Response:
    """Return the page."""
    return _answer(request, "index.html")


@router.head("/docs")
@router.get("/docs")
async def docs(request: Request) -> Response:
    """Return the description of the API."""
    return _answer(request, "docs.html")


@router.head("/static/{name}")
@router.get("/static/{name}")
async def static(request: Request, name: str) -> Response:
    """Return a file of the page."""
    if name not in _names():
        raise Problem("not_found", f"there is no file {name[:40]!r}")
    return _answer(request, name)
