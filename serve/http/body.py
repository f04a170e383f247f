"""The picture in a request: a raw body, or a file in a multipart form, read under a limit of bytes and of
time.

Bytes are counted as they arrive, whatever `Content-Length` says; what is announced too large is refused
before any of it is read. URLs are not accepted in place of a picture: the endpoint fetches nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from serve.http.limits import ByteBudget, announced_bytes, too_large
from serve.http.problems import Problem, option_problem
from serve.settings import LimitSettings

_FILE_FIELDS = ("image", "file", "mask")
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 16_384
_MAX_JSON_BYTES = 1_000_000

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Body:
    """The content of a request.

    Fields:
        picture: Encoded picture.
        filename: File name in the form, or empty.
        options: Options in the form.
        mask: Encoded mask in the form, or empty.
    """

    picture: bytes
    filename: str = ""
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    mask: bytes = b""


class Reader:
    """Reads one body; the bytes stay counted in the budget until `close`.

    Args:
        limits: Limits of the endpoint.
        budget: Budget that all requests share.
    """

    def __init__(self, limits: LimitSettings, budget: ByteBudget) -> None:
        self._limits, self._budget = limits, budget
        self._counted = 0

    def close(self) -> None:
        """Give the bytes back to the budget."""
        self._budget.give_back(self._counted)
        self._counted = 0

    async def read(self, request: Request) -> Body:
        """Read the body.

        Raises:
            Problem: too_large, slow_client, busy, empty, bad_multipart, unsupported_format; closed, when the
                client went away.
        """
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(
                "unsupported_format", "the body is compressed (Content-Encoding); send the file as it is"
            )
        data = await self._bytes(request, self._limits.max_body_bytes)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await _form(request, data)
        if not data:
            raise Problem(
                "empty",
                "the body has 0 bytes; send an encoded picture, or a form with the file in the field `image`",
            )
        return Body(data)

    def _count(self, num_bytes: int) -> None:
        self._budget.take(num_bytes)
        self._counted += num_bytes

    async def read_json(self, request: Request, kind: type[Model]) -> Model:
        """Read a body that is a JSON object.

        Raises:
            Problem: bad_option; too_large, slow_client, busy; closed, when the client went away. Another
                Content-Type is a bad_option: this is one that a browser does not let a page elsewhere send
                without asking the server first.
        """
        content_type = request.headers.get("content-type", "")
        if content_type.partition(";")[0].strip().lower() != "application/json":
            raise Problem(
                "bad_option",
                f"the body must be JSON, with Content-Type: application/json, got {content_type[:80]!r}",
            )
        data = await self._bytes(request, min(_MAX_JSON_BYTES, self._limits.max_body_bytes))
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise option_problem(error, kind.model_fields) from None

    async def _bytes(self, request: Request, limit: int) -> bytes:
        if (announced := announced_bytes(request.headers.get("content-length", ""))) > limit:
            raise too_large(str(announced), limit)
        # One mapping, which is returned to the system; small pieces would leave holes in the heap.
        data = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                async for chunk in request.stream():
                    if self._counted + len(chunk) > limit:
                        raise too_large(f"more than {limit}", limit)
                    self._count(len(chunk))
                    data += chunk
        except TimeoutError:
            raise Problem(
                "slow_client", f"the body did not arrive within {self._limits.body_s:g} s"
            ) from None
        except ClientDisconnect:
            raise Problem("closed", "the client went away") from None
        return bytes(data)


async def _form(request: Request, data: bytes) -> Body:
    async def once() -> AsyncGenerator[bytes]:
        yield data
        yield b""

    parser = MultiPartParser(
        request.headers, once(), max_files=2, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Problem("bad_multipart", error.message) from None
    try:
        picture, mask, filename, options = b"", b"", "", dict[str, Any]()
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in _FILE_FIELDS:
                    raise Problem(
                        "bad_multipart",
                        f"the file is in the field {name[:40]!r}; it must be `image`, or `mask`",
                    )
                if name == "mask":
                    mask = await value.read()
                    if not mask:
                        raise Problem("empty", "the field `mask` of the form has an empty file")
                    continue
                if picture:
                    raise Problem("bad_multipart", "the form has two pictures; one at a time")
                picture, filename = await value.read(), value.filename or ""
            elif name == "options":
                options |= _json_object(value)
            else:
                options[name] = value
    finally:
        await form.close()
    if not picture:
        raise Problem("empty", "the form has no file, or an empty one, in the field `image`")
    return Body(picture, filename, options, mask)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Problem("bad_option", "the field `options` must hold a JSON object")
    return {str(name): one for name, one in value.items()}
