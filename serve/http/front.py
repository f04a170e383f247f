"""The door in front of the gateway: limits on bodies that hold inside Serve's proxy.

Serve's proxy (Ray 2.60) takes a body as fast as it comes and hands it on without being asked. The gateway
refuses what is too large, but its refusal travels while the rest arrives: of a body without end, hundreds of
megabytes come to lie in the memory of both. So the proxy itself counts, and has a clock.

The proxy calls `middlewares` when it starts, because the configuration sets
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` under `controller_options`; the limits travel beside it
(`environment`). They hold for every application of this Serve. Without them the gateway's own limits still
answer, later. Refusals made here are in the proxy's log and Serve's own metrics, not in the gateway's.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.middleware import Middleware

from serve.http.limits import ByteBudget, announced_bytes, too_large
from serve.http.problems import Problem
from serve.settings import LimitSettings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
# Limits and the variables that carry them.
VARIABLES = {
    "body_mb": "RESSHIFT_SERVE_BODY_MB",
    "bodies_mb": "RESSHIFT_SERVE_BODIES_MB",
    "body_s": "RESSHIFT_SERVE_BODY_S",
}
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_LOG_EVERY_S = 10.0

logger = logging.getLogger(__name__)


class Front:
    """ASGI middleware: counts bodies as they arrive, and answers for the application when one must not go on.

    Args:
        app: Serve's proxy.
        max_body_bytes: of one request.
        body_s: for a body to arrive.
        budget: of the bodies of all requests whose answer has not begun.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], max_body_bytes: int, body_s: float, budget: ByteBudget
    ) -> None:
        self._app, self._max_body_bytes, self._body_s, self._budget = app, max_body_bytes, body_s, budget
        self._num_refused, self._logged_at = 0, float("-inf")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, as far as it may come."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        announced = announced_bytes(headers.get(b"content-length", b"").decode("latin-1"))
        if announced > self._max_body_bytes:
            await self._refuse(too_large(str(announced), self._max_body_bytes), scope, receive, send)
            return
        # `held` are bytes in the budget, `counted` those of the request.
        held = counted = 0
        is_arriving = announced > 0 or b"transfer-encoding" in headers
        has_begun = is_refused = is_dropping = False
        due = time.monotonic() + self._body_s

        async def receiving() -> Message:
            nonlocal held, counted, is_arriving, is_refused, is_dropping
            while not is_refused:
                try:
                    message = await self._next(receive, due if is_arriving and not has_begun else None)
                    num_bytes = len(message.get("body", b""))
                    if message["type"] == "http.request":
                        is_arriving = message.get("more_body", False)
                    if counted + num_bytes > self._max_body_bytes:
                        raise too_large(f"more than {self._max_body_bytes}", self._max_body_bytes)
                    if not has_begun:
                        self._budget.take(num_bytes)
                        held += num_bytes
                except Problem as problem:
                    is_dropping = True  # when the answer is on its way: what still comes has a hole in it
                    if not has_begun:
                        is_refused = True
                        await self._refuse(problem, scope, receive, send)
                    continue
                if message["type"] != "http.request" or not is_dropping:
                    counted += num_bytes
                    return message
            return {"type": "http.disconnect"}

        def let_go() -> None:
            nonlocal held
            self._budget.give_back(held)
            held = 0

        async def sending(message: Message) -> None:
            nonlocal has_begun
            if is_refused:
                return
            if message["type"] == "http.response.start":
                has_begun = True
                let_go()
                if is_arriving:  # or the server would read all the rest, to find the next request behind it
                    message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            let_go()

    async def _next(self, receive: Receive, due: float | None) -> Message:
        if due is None:
            return await receive()
        try:
            async with asyncio.timeout(max(0.0, due - time.monotonic())):
                return await receive()
        except TimeoutError:
            raise Problem("slow_client", f"the body did not arrive within {self._body_s:g} s") from None

    async def _refuse(self, problem: Problem, scope: Message, receive: Receive, send: Send) -> None:
        self._num_refused += 1
        if time.monotonic() - self._logged_at > _LOG_EVERY_S:
            logger.warning(
                "refused=%d latest=%d %s: %s", self._num_refused, problem.status, problem.kind, problem.detail
            )
            self._num_refused, self._logged_at = 0, time.monotonic()
        answer = problem.response()
        answer.headers["connection"] = "close"
        answer.raw_headers.extend(SAFE_HEADERS)
        await answer(scope, receive, send)


def environment(limits: LimitSettings) -> dict[str, str]:
    """Return what Serve's controller, and so its proxies, must have in their environment for `limits` to hold
    in the proxy.
    """
    values = {name: float(getattr(limits, field)) for field, name in VARIABLES.items()}
    return {CALLBACK: f"{__name__}:middlewares"} | {
        name: repr(value).removesuffix(".0") for name, value in values.items()
    }


def limits_of(variables: Mapping[str, str]) -> LimitSettings:
    """Return the limits in an environment; those that are missing have their defaults.

    Raises:
        ValueError: one is no positive number.
    """

    def number(field: str, name: str) -> float:
        try:
            return float(variables.get(name, getattr(LimitSettings(), field)))
        except ValueError:
            raise ValueError(f"{name} must be a positive number, got {variables[name]!r}") from None

    body_mb, bodies_mb, body_s = (number(field, name) for field, name in VARIABLES.items())
    return LimitSettings(body_mb=body_mb, bodies_mb=bodies_mb, body_s=body_s)


def middlewares() -> list[Middleware]:
    """Return what Serve's proxy puts before itself."""
    limits = limits_of(os.environ)
    budget = ByteBudget(int(limits.bodies_mb * 1e6))
    return [Middleware(Front, max_body_bytes=limits.max_body_bytes, body_s=limits.body_s, budget=budget)]


def check(limits: LimitSettings, variables: Mapping[str, str] = os.environ) -> None:
    """Compare the limits of a gateway with those of the proxy in front of it, as far as the gateway's
    environment tells.

    Raises:
        ValueError: the proxy refuses what the gateway would take.
    """
    if variables.get(CALLBACK) != environment(limits)[CALLBACK]:
        logger.warning(
            "the proxy does not count bodies: set controller_options as in serve/config.yaml, and start "
            "Serve anew"
        )
        return
    before = limits_of(variables)
    for field, name in VARIABLES.items():
        if getattr(before, field) < getattr(limits, field):
            raise ValueError(
                f"limits.{field} is {getattr(limits, field):g}, but the proxy was started with "
                f"{getattr(before, field):g}: "
                f"set controller_options.runtime_env.env_vars.{name}, and start Serve anew"
            )
