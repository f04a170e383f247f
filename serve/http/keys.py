"""API keys: who may call, and how often.

    python -m serve --new-key alice          prints a key, once, and the entry for the configuration

A key has 256 random bits, so its SHA-256 is as good as it: the configuration holds digests, and a leaked one
opens nothing. Every entry is compared in constant time. Without any entry the endpoint answers callers on
this machine alone, by four tests: Serve listens on loopback, the peer is a loopback address, so is the name
in `Host` (a web page that makes its own name point here is refused), and no proxy hands the request on. A
proxy is known by the headers that it adds, or by HTTP/1.0, which nginx speaks to its upstreams unless told
otherwise: it writes `Host` anew, and its peer is this machine. A proxy that hides itself entirely cannot be
told from a local program, so behind a proxy there should be keys.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from serve.http.limits import Quota
from serve.http.problems import Problem
from serve.settings import KeySettings

_PREFIX = "rsk_"
_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
_UNSAFE_SITES = ("cross-site", "same-site")


def new_key() -> str:
    """Return a fresh key."""
    return _PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """Return the digest of a key that the configuration holds: 64 hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Return whether an address or name of a host, with or without a port, is this machine's loopback."""
    unbracketed = host[1:].partition("]")[0] if host.startswith("[") else host
    name = unbracketed if unbracketed.count(":") > 1 else unbracketed.partition(":")[0]
    if name.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request.

    Fields:
        name: Name of the key; empty where no key is needed.
        quota: Quota of the caller.
    """

    name: str
    quota: Quota


class Keys:
    """The keys of an endpoint.

    Args:
        entries: Keys of the configuration; without any, only callers on this machine are answered.
        behind_proxy: Whether those that a proxy hands on are among them.
    """

    def __init__(self, entries: Sequence[KeySettings], behind_proxy: bool = False) -> None:
        self._behind_proxy = behind_proxy
        self._entries = [
            (entry.sha256, Caller(entry.name, Quota(entry.requests_per_minute, entry.megapixels_per_minute)))
            for entry in entries
        ]
        self._anyone = Caller("", Quota(None, None))

    def share(self, num_shares: int) -> None:
        """Let every quota be one of `num_shares` equal parts from now on."""
        for _, caller in self._entries:
            caller.quota.share(num_shares)

    def caller(self, headers: Headers, peer: str | None, http_version: str = "1.1") -> Caller:
        """Return the caller.

        Args:
            headers: Headers of the request, with the key in `Authorization: Bearer KEY` or `X-API-Key`.
            peer: Address of the other end of the connection.
            http_version: Version of the protocol on it.

        Raises:
            Problem: unauthorised; forbidden.
        """
        if not self._entries:
            return self._local_caller(headers, peer, http_version)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if not key:
            raise Problem("unauthorised", "send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`")
        found, asked = None, digest(key)
        for expected, caller in self._entries:  # always all of them, so that the time reveals nothing
            if hmac.compare_digest(expected, asked):
                found = caller
        if found is None:
            raise Problem("unauthorised", "the key is not known here")
        return found

    def _local_caller(self, headers: Headers, peer: str | None, http_version: str) -> Caller:
        is_handed_on = http_version == "1.0" or any(name in headers for name in _PROXY_HEADERS)
        if is_handed_on and not self._behind_proxy:
            raise Problem(
                "forbidden",
                "this endpoint has no API keys and answers no proxy: make keys (python -m serve --new-key), "
                "or set behind_proxy if everybody who reaches the proxy may use it",
            )
        is_here = self._behind_proxy or is_loopback(headers.get("host", ""))
        if peer is None or not is_loopback(peer) or not is_here:
            raise Problem(
                "forbidden", "this endpoint has no API keys, so it answers callers on its own machine alone"
            )
        if headers.get("sec-fetch-site") in _UNSAFE_SITES:
            raise Problem("forbidden", "a page of another site may not use this endpoint")
        return self._anyone
