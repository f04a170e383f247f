"""The door in front of the gateway: limits on bodies that hold inside Serve's proxy.

Serve's proxy (Ray 2.60) takes a body as fast as it comes and hands it on without being asked. The gateway refuses what is too large, but
its refusal travels while the rest arrives: of a body without end, hundreds of megabytes come to lie in the memory of both. So the proxy
itself counts.

The proxy calls `middlewares` when it starts, because the configuration sets `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` under
`controller_options`; the limits travel beside it (`environment`). Without them the gateway's own limits still answer, later.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from serve.limits import ByteBudget
from serve.problems import Problem
from serve.settings import LimitSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
BODY_MB, BODIES_MB = "RESSHIFT_SERVE_BODY_MB", "RESSHIFT_SERVE_BODIES_MB"

logger = logging.getLogger(__name__)


class Front:
    """ASGI middleware: counts bodies as they arrive, and answers for the application when one must not go on.

    Args:
        app: Serve's proxy.
        max_body_bytes: of one request.
        budget: of all requests that have not been answered.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], max_body_bytes: int, budget: ByteBudget) -> None:
        self._app, self._max_body_bytes, self._budget = app, max_body_bytes, budget

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, as far as it may come."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._max_body_bytes:
            await _refuse(self._too_large(f"{int(announced)} bytes"), scope, receive, send)
            return
        counted = 0
        has_begun = is_refused = False

        async def receiving() -> Message:
            nonlocal counted, is_refused
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                num_bytes = len(message.get("body", b""))
                try:
                    if counted + num_bytes > self._max_body_bytes:
                        raise self._too_large(f"more than {self._max_body_bytes} bytes")
                    self._budget.take(num_bytes)
                except Problem as problem:
                    if has_begun:
                        continue  # the answer is on its way; what still comes is dropped
                    is_refused = True
                    await _refuse(problem, scope, receive, send)
                    return {"type": "http.disconnect"}
                counted += num_bytes
                return message

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if is_refused:
                return
            has_begun = True
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            self._budget.give_back(counted)

    def _too_large(self, found: str) -> Problem:
        return Problem("too_large", f"the body has {found}, at most {self._max_body_bytes} are allowed", members={"reason": "too_large"})


async def _refuse(problem: Problem, scope: Message, receive: Receive, send: Send) -> None:
    answer = problem.response()
    answer.headers["connection"] = "close"  # or the server would read the rest to find the next request
    answer.headers["x-content-type-options"] = "nosniff"
    await answer(scope, receive, send)


def environment(limits: LimitSettings) -> dict[str, str]:
    """Return what Serve's controller, and so its proxies, must have in their environment for `limits` to hold in the proxy."""
    return {CALLBACK: f"{__name__}:middlewares", BODY_MB: f"{limits.body_mb:g}", BODIES_MB: f"{limits.bodies_mb:g}"}


def limits_of(variables: Mapping[str, str]) -> LimitSettings:
    """Return the limits in an environment; those that are missing have their defaults.

    Raises:
        ValueError: one is no positive number.
    """

    def number(name: str, default: float) -> float:
        try:
            return float(variables.get(name, default))
        except ValueError:
            raise ValueError(f"{name} must be a positive number, got {variables[name]!r}") from None

    defaults = LimitSettings()
    return LimitSettings(body_mb=number(BODY_MB, defaults.body_mb), bodies_mb=number(BODIES_MB, defaults.bodies_mb))


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy puts before itself."""
    limits = limits_of(os.environ)
    return [Middleware(Front, max_body_bytes=limits.max_body_bytes, budget=ByteBudget(int(limits.bodies_mb * 1e6)))]


def check(limits: LimitSettings, variables: Mapping[str, str] = os.environ) -> None:
    """Compare the limits of a gateway with those of the proxy in front of it, as far as the gateway's environment tells.

    Raises:
        ValueError: the proxy refuses what the gateway would take.
    """
    if variables.get(CALLBACK) != environment(limits)[CALLBACK]:
        logger.warning("the proxy does not count bodies: set controller_options as in serve/config.yaml, and start Serve anew")
        return
    before = limits_of(variables)
    for field, name in (("body_mb", BODY_MB), ("bodies_mb", BODIES_MB)):
        if getattr(before, field) < getattr(limits, field):
            raise ValueError(
                f"limits.{field} is {getattr(limits, field):g}, but the proxy was started with {getattr(before, field):g}: "
                f"set controller_options.runtime_env.env_vars.{name}, and start Serve anew"
            )
