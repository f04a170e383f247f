"""Who may call: keys are compared as digests, and without keys the endpoint is this machine's alone."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from serve.http.keys import Keys, digest, is_loopback, new_key
from serve.http.problems import Problem
from serve.settings import KeySettings

KEY, OTHER = new_key(), new_key()
KEYS = Keys(
    [
        KeySettings(name="alice", sha256=digest(KEY)),
        KeySettings(name="bob", sha256=digest(OTHER), requests_per_minute=1),
    ]
)


def test_keys_are_long_and_different() -> None:
    assert KEY != OTHER
    assert len(KEY) >= 43
    assert digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY} "}, {"X-API-Key": KEY}]
)
def test_key_is_found_in_either_header(headers: dict[str, str]) -> None:
    assert KEYS.caller(Headers(headers), "203.0.113.9").name == "alice"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer"},
        {"X-API-Key": KEY[:-1]},
        {"X-API-Key": digest(KEY)},
    ],
)
def test_anything_else_is_unauthorised_even_from_this_machine(headers: dict[str, str]) -> None:
    with pytest.raises(Problem) as refused:
        KEYS.caller(Headers(headers | {"Host": "127.0.0.1"}), "127.0.0.1")
    assert refused.value.status == 401
    assert refused.value.response().headers["www-authenticate"].startswith("Bearer")
    assert KEY not in bytes(refused.value.response().body).decode()


def test_a_key_has_one_quota_however_it_comes() -> None:
    KEYS.caller(Headers({"X-API-Key": OTHER}), None).quota.take_request()
    with pytest.raises(Problem):
        KEYS.caller(Headers({"Authorization": f"Bearer {OTHER}"}), None).quota.take_request()


@pytest.mark.parametrize(
    ("peer", "host", "site", "is_allowed"),
    [
        ("127.0.0.1", "127.0.0.1:8000", None, True),
        ("::1", "[::1]:8000", None, True),
        ("127.0.0.1", "localhost", "same-origin", True),
        ("192.0.2.1", "127.0.0.1:8000", None, False),
        (None, "127.0.0.1", None, False),
        (
            "127.0.0.1",
            "photos.example.org",
            None,
            False,
        ),  # a proxy on this machine, or a name that was made to point here
        ("127.0.0.1", "", None, False),
        ("127.0.0.1", "127.0.0.1.example.org", None, False),
        ("127.0.0.1", "127.0.0.1:8000", "cross-site", False),
    ],
)
def test_without_keys_only_this_machine(
    peer: str | None, host: str, site: str | None, is_allowed: bool
) -> None:
    headers = Headers({"host": host} | ({"sec-fetch-site": site} if site else {}))
    if is_allowed:
        assert Keys([]).caller(headers, peer).name == ""
    else:
        with pytest.raises(Problem) as refused:
            Keys([]).caller(headers, peer)
        assert refused.value.status == 403


@pytest.mark.parametrize(
    ("headers", "http_version"),
    [({"x-forwarded-for": "192.0.2.1"}, "1.1"), ({"forwarded": "for=192.0.2.1"}, "1.1"), ({}, "1.0")],
)
def test_without_keys_no_proxy_unless_told(headers: dict[str, str], http_version: str) -> None:
    handed_on = Headers({"host": "127.0.0.1:8000", **headers})
    with pytest.raises(Problem, match="answers no proxy"):
        Keys([]).caller(handed_on, "127.0.0.1", http_version)
    public = Headers({**headers, "host": "photos.example.org"})
    assert Keys([], behind_proxy=True).caller(public, "127.0.0.1", http_version).name == ""
    with pytest.raises(Problem):
        Keys([], behind_proxy=True).caller(public, "192.0.2.1", http_version)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.8.8.8", True), ("0.0.0.0", False), ("::", False), ("LOCALHOST:1", True), ("10.0.0.1", False)],
)
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


@pytest.mark.parametrize(
    "sha256", ["", "abc", digest(KEY).upper(), KEY], ids=["empty", "short", "upper", "raw"]
)
def test_configuration_takes_digests_only(sha256: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        KeySettings(name="alice", sha256=sha256)
