"""The door by its messages: what comes in, what is handed on, what is answered."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from ray.serve.schema import ServeDeploySchema

from serve.__main__ import arguments, configuration
from serve.http import front
from serve.http.front import SAFE_HEADERS, VARIABLES, Front, Message, check, environment, limits_of
from serve.http.limits import ByteBudget
from serve.settings import LimitSettings


class Proxy:
    """An application that reads a body and answers `ok`; `answers_first`: before it has read all."""

    def __init__(self, answers_first: bool = False) -> None:
        self.answers_first = answers_first
        self.got: list[Message] = []

    async def __call__(self, scope: Message, receive: front.Receive, send: front.Send) -> None:
        del scope
        if self.answers_first:
            await send({"type": "http.response.start", "status": 401, "headers": []})
        while True:
            self.got.append(await receive())
            if not self.got[-1].get("more_body"):
                break
        if not self.answers_first:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    @property
    def num_bytes(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.got)


class Client:
    """Sends a body in pieces and keeps what it is answered."""

    def __init__(self, pieces: list[bytes], announced: int | str | None = None) -> None:
        self.pieces: Iterator[bytes] = iter(pieces)
        self.num_left = len(pieces)
        self.answered: list[Message] = []
        chunked = [(b"transfer-encoding", b"chunked")] if pieces else []
        headers = chunked if announced is None else [(b"content-length", str(announced).encode())]
        self.scope: Message = {"type": "http", "method": "POST", "path": "/", "headers": headers}

    async def receive(self) -> Message:
        await asyncio.sleep(0)
        self.num_left -= 1
        if self.num_left < 0:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": next(self.pieces), "more_body": self.num_left > 0}

    async def send(self, message: Message) -> None:
        self.answered.append(message)

    @property
    def status(self) -> int:
        assert [message["type"] for message in self.answered] == ["http.response.start", "http.response.body"]
        return self.answered[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.answered[0]["headers"])


def visit(
    client: Client, proxy: Proxy, limit: int = 10, budget: ByteBudget | None = None, body_s: float = 60
) -> ByteBudget:
    budget = budget or ByteBudget(100)
    asyncio.run(Front(proxy, limit, body_s, budget)(client.scope, client.receive, client.send))
    return budget


def test_a_body_within_the_limit_is_handed_on_as_it_came() -> None:
    client, proxy = Client([b"abcd", b"", b"efghij"], announced=10), Proxy()
    budget = visit(client, proxy)
    assert [(message["body"], message["more_body"]) for message in proxy.got] == [
        (b"abcd", True),
        (b"", True),
        (b"efghij", False),
    ]
    assert client.status == 200
    assert budget.used == 0


def test_an_announced_body_that_is_too_large_reaches_nobody() -> None:
    client, proxy = Client([b"x" * 11], announced=11), Proxy()
    visit(client, proxy)
    assert client.status == 413
    assert not proxy.got
    assert client.num_left == 1
    problem = json.loads(client.answered[1]["body"])
    assert problem["type"] == "/problems/too_large"
    assert problem["detail"] == "the body has 11 bytes, at most 10 are allowed"


def test_a_body_that_grows_too_large_is_answered_at_the_limit_and_not_read_on() -> None:
    client, proxy = Client([b"x" * 4] * 1000), Proxy()
    budget = visit(client, proxy)
    assert client.status == 413  # and the proxy's own answer to the disconnect is dropped
    assert client.headers[b"connection"] == b"close"
    assert set(SAFE_HEADERS) <= set(client.headers.items())
    assert proxy.num_bytes == 8
    assert proxy.got[-1] == {"type": "http.disconnect"}
    assert client.num_left == 1000 - 3
    assert budget.used == 0


def test_what_comes_after_a_piece_that_was_dropped_is_dropped_too() -> None:
    """The last piece would fit again, but what the proxy then had is not what was sent."""
    client, proxy = Client([b"x" * 4, b"x" * 8, b"x"]), Proxy(answers_first=True)
    visit(client, proxy)
    assert client.status == 401
    assert [message.get("body") for message in proxy.got] == [b"x" * 4, None]
    assert client.num_left < 0


def test_an_answer_before_the_end_of_the_body_closes_the_connection() -> None:
    early, late, without = Client([b"x"] * 3), Client([b"x"] * 3), Client([])
    visit(early, Proxy(answers_first=True))
    visit(late, Proxy())
    visit(without, Proxy(answers_first=True))
    assert [client.headers.get(b"connection") for client in (early, late, without)] == [b"close", None, None]


def test_a_body_that_does_not_arrive_in_time_is_answered() -> None:
    class Stalled(Client):
        async def receive(self) -> Message:
            if self.num_left == 1:
                await asyncio.sleep(60)
            return await super().receive()

    client, proxy = Stalled([b"x", b"x"]), Proxy()
    budget = visit(client, proxy, body_s=0.05)
    assert client.status == 408
    assert proxy.got[-1] == {"type": "http.disconnect"}
    assert budget.used == 0


def test_who_waits_for_an_answer_has_no_deadline() -> None:
    class Patient(Client):
        async def receive(self) -> Message:
            if self.num_left == 0:
                await asyncio.sleep(0.1)
            return await super().receive()

    async def slow(scope: Message, receive: front.Receive, send: front.Send) -> None:
        del scope
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    client = Patient([b"x"])
    asyncio.run(Front(slow, 10, 0.02, ByteBudget(10))(client.scope, client.receive, client.send))
    assert client.status == 200


def test_bytes_are_given_back_when_the_answer_begins() -> None:
    budget, seen = ByteBudget(100), list[int]()

    class Watching(Client):
        async def send(self, message: Message) -> None:
            seen.append(budget.used)
            await super().send(message)

    visit(Watching([b"x" * 4]), Proxy(), budget=budget)
    assert seen == [0, 0]


@pytest.mark.parametrize(
    ("length", "status"), [("0" * 5000 + "4", 200), ("9" * 5000, 413), ("10", 200), ("11", 413), ("x", 200)]
)
def test_any_length_can_be_announced(length: str, status: int) -> None:
    client = Client([b"abcd"], announced=length)
    visit(client, Proxy())
    assert client.status == status


def test_refusals_are_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    door = Front(Proxy(), 10, 60, ByteBudget(10))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            client = Client([b""], announced=11)
            asyncio.run(door(client.scope, client.receive, client.send))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "refused=1 latest=413 too_large"
    ]


def test_bodies_of_all_requests_share_a_budget() -> None:
    budget = ByteBudget(12)
    budget.take(8)  # of another request
    client, proxy = Client([b"x" * 4, b"x"]), Proxy()
    visit(client, proxy, budget=budget)
    assert client.status == 503
    assert client.headers[b"retry-after"] == b"1"
    assert budget.used == 8


def test_a_proxy_that_fails_gives_its_bytes_back() -> None:
    async def failing(scope: Message, receive: front.Receive, send: front.Send) -> None:
        del scope, send
        await receive()
        raise ConnectionResetError

    client, budget = Client([b"x" * 4]), ByteBudget(100)
    with pytest.raises(ConnectionResetError):
        asyncio.run(Front(failing, 10, 60, budget)(client.scope, client.receive, client.send))
    assert budget.used == 0


def test_other_protocols_pass() -> None:
    seen: list[Any] = []

    async def proxy(*arguments: object) -> None:
        seen.append(arguments)

    asyncio.run(Front(proxy, 10, 60, ByteBudget(10))({"type": "websocket"}, 1, 2))  # type: ignore[arg-type]
    assert seen == [({"type": "websocket"}, 1, 2)]


def test_the_environment_carries_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = LimitSettings(body_mb=2.5, bodies_mb=123.4564999, body_s=7)
    for name, value in environment(limits).items():
        monkeypatch.setenv(name, value)
    (middleware,) = front.middlewares()
    made: Any = middleware.cls(Proxy(), *middleware.args, **middleware.kwargs)
    assert (made._max_body_bytes, made._body_s, made._budget.limit) == (2_500_000, 7, 123_456_499)
    check(limits, environment(limits))
    assert limits_of({}) == LimitSettings()


def test_serve_takes_the_environment_of_a_printed_configuration() -> None:
    config = configuration(arguments().parse_args(["--model", "nearest-x4"]))
    options = ServeDeploySchema.model_validate(config).controller_options
    assert options is not None
    assert options.runtime_env == {"env_vars": environment(LimitSettings())}


@pytest.mark.parametrize("value", ["0", "-1", "much", "nan", ""])
def test_a_limit_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ValueError, match=r"body_mb must be|RESSHIFT_SERVE_BODY_MB must be|finite"):
        limits_of({VARIABLES["body_mb"]: value})


def test_a_gateway_does_not_start_behind_a_narrower_proxy(caplog: pytest.LogCaptureFixture) -> None:
    check(LimitSettings(), environment(LimitSettings()))
    check(LimitSettings(body_mb=1), environment(LimitSettings()))
    with pytest.raises(
        ValueError, match=r"limits.body_mb is 65, but the proxy was started with 64: .*RESSHIFT_SERVE_BODY_MB"
    ):
        check(LimitSettings(body_mb=65), environment(LimitSettings()))
    with pytest.raises(ValueError, match=r"limits.bodies_mb is 600"):
        check(LimitSettings(bodies_mb=600), environment(LimitSettings()))
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        check(LimitSettings(), {})
    assert "does not count bodies" in caplog.text
