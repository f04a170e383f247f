"""Errors over HTTP as problem details (RFC 9457): a closed vocabulary of kinds, each with one status.

    HTTP/1.1 413 Content Too Large
    content-type: application/problem+json

    {"type": "/problems/too_large", "title": "...", "status": 413,
     "detail": "the picture is 65000x65000 = ...", "reason": "too_large"}

`type` can be opened: it says what the kind means. A refusal that may be tried again carries `Retry-After` in
whole seconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from resshift.config import OptionError
from resshift.images import ImageReason

MEDIA_TYPE = "application/problem+json"


@dataclass(frozen=True, slots=True)
class Kind:
    """The meaning of a kind of problem.

    Fields:
        status: HTTP status of the answer.
        title: Title, the same for every occurrence.
    """

    status: int
    title: str


KINDS: dict[str, Kind] = {
    "empty": Kind(400, "The request has no picture"),
    "bad_multipart": Kind(400, "The multipart body cannot be read"),
    "unauthorised": Kind(401, "An API key is needed"),
    "forbidden": Kind(403, "This is not allowed"),
    "not_found": Kind(404, "There is no such thing here"),
    "method_not_allowed": Kind(405, "This method is not for this address"),
    "not_acceptable": Kind(406, "The result cannot be had in the types that are accepted"),
    "slow_client": Kind(408, "The request took too long to arrive"),
    "conflict": Kind(409, "This is in the way of something that exists"),
    "too_large": Kind(413, "The picture or the request is too large"),
    "unsupported_format": Kind(415, "The body is none of the accepted types"),
    "bad_option": Kind(422, "An option cannot be used"),
    "unreadable": Kind(422, "The picture cannot be decoded"),
    "bad_mask": Kind(422, "The mask of the hole is missing or cannot be used"),
    "unwritable": Kind(422, "The result cannot be written in this format"),
    "reused_key": Kind(422, "The idempotency key was used for another request"),
    "rate_limited": Kind(429, "This API key has used up its share for now"),
    "closed": Kind(499, "The client went away"),
    "failed": Kind(500, "The picture could not be upscaled"),
    "busy": Kind(503, "There is more work than can be done in time"),
    "unavailable": Kind(503, "The model does not run at the moment"),
    "timeout": Kind(504, "The picture was not done in time"),
}

_KIND_BY_REASON: dict[str, str] = {
    ImageReason.EMPTY: "empty",
    ImageReason.NOT_AN_IMAGE: "unsupported_format",
    ImageReason.UNSUPPORTED_FORMAT: "unsupported_format",
    ImageReason.UNSUPPORTED_MODE: "unreadable",
    ImageReason.TRUNCATED: "unreadable",
    ImageReason.CORRUPT: "unreadable",
    ImageReason.TOO_LARGE: "too_large",
    ImageReason.ANIMATED: "unreadable",
    ImageReason.NO_MASK: "bad_mask",
    ImageReason.BAD_MASK: "bad_mask",
    "timeout": "unreadable",
    "killed_worker": "unreadable",
    "out_of_memory": "too_large",
    "encode_error": "unwritable",
    "upscale_error": "failed",
}


class Problem(Exception):
    """An answer that is an error.

    Args:
        kind: Name of the kind in `KINDS`.
        detail: Text about this occurrence for the user, with the value and what is allowed.
        retry_after_s: Seconds after which another try makes sense.
        members: Further members of the body.
    """

    def __init__(
        self,
        kind: str,
        detail: str,
        *,
        retry_after_s: float | None = None,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.kind, self.detail, self.retry_after_s, self.members = (
            kind,
            detail,
            retry_after_s,
            dict(members or {}),
        )
        self.status = KINDS[kind].status

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (
            self.kind,
            self.detail,
            self.retry_after_s,
            self.members,
        )  # survives the trip from a replica

    def response(self) -> JSONResponse:
        """Return the answer."""
        kind = KINDS[self.kind]
        body = {
            "type": f"/problems/{self.kind}",
            "title": kind.title,
            "status": kind.status,
            "detail": self.detail,
        } | self.members
        headers: dict[str, str] = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        if kind.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="resshift"'
        return JSONResponse(body, kind.status, headers, MEDIA_TYPE)


def _again(kind: str, detail: str, retry_after_s: float | None, members: Mapping[str, Any]) -> Problem:
    return Problem(kind, detail, retry_after_s=retry_after_s, members=members)


def picture_problem(reason: str, detail: str) -> Problem:
    """Return the problem of a picture that was refused for one of the ledger's reasons, which the body
    repeats.
    """
    return Problem(_KIND_BY_REASON[reason], detail, members={"reason": str(reason)})


def option_problem(
    error: ValidationError | RequestValidationError | OptionError, allowed: Collection[str] = ()
) -> Problem:
    """Return the problem of options that cannot be used: one entry of `errors` for each.

    Args:
        error: What is wrong.
        allowed: Names of the options that there are.
    """
    if isinstance(error, OptionError):
        errors = [{"option": error.option, "message": error.message}]
        return Problem("bad_option", f"{error.option} {error.message}", members={"errors": errors})
    errors = [
        {"option": ".".join(str(part) for part in one["loc"]), "message": _told(one, allowed)}
        for one in error.errors()
    ]
    told = "; ".join(f"{one['option']}: {one['message']}" for one in errors)
    return Problem("bad_option", told, members={"errors": errors})


def _told(error: Mapping[str, Any], allowed: Collection[str]) -> str:
    """Return what is wrong with one option."""
    if error["type"] == "extra_forbidden":
        return f"there is no such option; allowed: {', '.join(sorted(allowed))}" if allowed else "unknown"
    return str(error["msg"])


def _options_of(request: Request) -> list[str]:
    """Return the names of the query options of the route that has this request."""
    dependant = getattr(request.scope.get("route"), "dependant", None)
    parameters = getattr(dependant, "query_params", [])
    models = [getattr(one.field_info.annotation, "model_fields", {one.alias: None}) for one in parameters]
    return [name for fields in models for name in fields]


def install(api: FastAPI) -> None:
    """Make every error of an application a problem document. Handlers are coroutines for the reason that
    `serve.services.caller` is one.
    """
    kind_by_status = {404: "not_found", 405: "method_not_allowed"}

    async def on_problem(request: Request, error: Exception) -> JSONResponse:
        del request
        assert isinstance(error, Problem)
        return error.response()

    async def on_invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return option_problem(error, _options_of(request)).response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        kind = kind_by_status.get(error.status_code)
        if kind is not None:
            answer = Problem(kind, f"{request.method} {request.url.path}").response()
        else:
            body = {"type": "about:blank", "title": str(error.detail), "status": error.status_code}
            answer = JSONResponse(body, error.status_code, media_type=MEDIA_TYPE)
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            # Starlette names the methods of the first of several routes of an address.
            answer.headers["allow"] = ", ".join(
                method
                for method in ("DELETE", "GET", "HEAD", "POST")
                if any(
                    one.matches({**request.scope, "method": method})[0] == Match.FULL for one in api.routes
                )
            )
        return answer

    async def on_mistake(request: Request, error: Exception) -> JSONResponse:
        del request, error  # the server logs it with its traceback, which is not for clients
        return Problem("failed", "internal server error; see the server log").response()

    api.add_exception_handler(Problem, on_problem)
    api.add_exception_handler(RequestValidationError, on_invalid)
    api.add_exception_handler(HTTPException, on_http)
    api.add_exception_handler(Exception, on_mistake)
