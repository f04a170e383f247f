"""One object store: who talks to it, how often it is asked again, and what every written object is given.

Retries are botocore's "standard" mode and nothing on top of it: full-jitter exponential back-off up to 20 s,
SlowDown and other throttling answers recognised, and a budget (500 tokens a client, 5 a retry, 1 back a
success) that stops a storm when the store is down. Bodies that break while they are read are asked for again
here, with the same jitter: botocore hands out the stream and does not see it end.

Clients are made per process on first use and kept by s3fs; they do not survive a fork. Credentials come from
the environment or a profile, never from a URI or an option: options are written into job records.
"""

# botocore and s3fs ship no types: what they leave unknown is not an error of ours.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, cast

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from fsspec.asyn import sync
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

# What is inferred for the synchronous calls of S3FileSystem is wrong: they return the answer, not None.
Client: TypeAlias = Any
_BAD_CONNECTIONS = 5  # of a pool, one after the other
ACCESS_ERRORS = (OSError, BotoCoreError, ClientError, UnicodeError, *S3_RETRYABLE_ERRORS)


class TooLargeError(ValueError):
    """The object is larger than the caller accepts; nothing of its body was read."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.size_bytes = size_bytes


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class S3Options:
    """How a bucket is reached, and how objects are written into it. The defaults follow the environment.

    Fields:
        endpoint: URL of another store than AWS; default `AWS_ENDPOINT_URL_S3`, then `AWS_ENDPOINT_URL`.
        region: default: the environment's.
        profile: of ~/.aws/config on every node.
        anonymous: send no credentials (public buckets).
        requester_pays: agree to pay for requests to a bucket that asks for it.
        sse: server-side encryption of written objects, "AES256" or "aws:kms".
        sse_kms_key: of "aws:kms"; default: the account's.
        storage_class: of written objects, for example "STANDARD_IA".
        attempts: of one request, the first included; also of a body that breaks.
        timeout_s: for a connection and between two bytes.
        connections: at a time, a process.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    anonymous: bool = False
    requester_pays: bool = False
    sse: Literal["AES256", "aws:kms"] | None = None
    sse_kms_key: str | None = None
    storage_class: str | None = None
    attempts: int = 8
    timeout_s: float = 60.0
    connections: int = 32

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.connections < 1 or self.timeout_s <= 0:
            got = f"{self.attempts}, {self.connections}, {self.timeout_s}"
            raise ValueError(f"attempts and connections must be at least 1 and timeout_s positive, got {got}")
        if self.sse_kms_key is not None and self.sse != "aws:kms":
            raise ValueError(f"sse_kms_key needs sse=aws:kms, got sse={self.sse}")

    def for_reading(self) -> dict[str, str]:
        """Return the arguments of every GET, HEAD and list request."""
        return {"RequestPayer": "requester"} if self.requester_pays else {}

    def for_writing(self, content_type: str | None) -> dict[str, str]:
        """Return the arguments of every PUT."""
        named = {
            "ContentType": content_type,
            "ServerSideEncryption": self.sse,
            "SSEKMSKeyId": self.sse_kms_key,
            "StorageClass": self.storage_class,
        }
        return self.for_reading() | {name: value for name, value in named.items() if value is not None}


DEFAULT = S3Options()


def client(options: S3Options = DEFAULT) -> Client:
    """Return this process's client. s3fs keeps one per process, thread and options, and forgets them after a
    fork.
    """
    endpoint = options.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    filesystem = S3FileSystem(
        endpoint_url=endpoint,
        anon=options.anonymous,
        profile=options.profile,
        client_kwargs={"region_name": options.region} if options.region else {},
        config_kwargs={
            "retries": {"mode": "standard", "max_attempts": options.attempts},
            "connect_timeout": options.timeout_s,
            "read_timeout": options.timeout_s,
            "max_pool_connections": options.connections,
        },
        use_listings_cache=False,
    )
    filesystem.retries = 1  # s3fs would ask again around botocore, without a budget
    return filesystem


def call(options: S3Options, method: str, **arguments: object) -> dict[str, Any]:
    """Send one request and return the answer."""
    filesystem = client(options)
    wait: Any = sync
    return cast(dict[str, Any], wait(filesystem.loop, _send, filesystem, method, arguments))


async def _send(filesystem: Client, method: str, arguments: Mapping[str, object]) -> dict[str, Any]:
    """Send a request, again when the connection that it was given was no good.

    A server may leave bytes on a connection that it keeps open (Swift ends a HEAD that found nothing like a
    body in chunks). The next request on it sees a bad status line, which botocore does not know as a reason
    to ask again. Every request here may be sent twice.
    """
    for _ in range(_BAD_CONNECTIONS):
        try:
            return await filesystem._call_s3(method, **arguments)
        except HTTPClientError as error:
            if type(error) is not HTTPClientError:  # the subclasses are what botocore has tried again already
                raise
    return await filesystem._call_s3(method, **arguments)


def get(
    options: S3Options, bucket: str, key: str, max_bytes: int | None, byte_range: str | None = None
) -> bytes:
    """Read an object, or a part of it ("bytes=0-99", RFC 9110); exactly as long as the store announced it.

    Raises:
        TooLargeError: above `max_bytes`, before the body is read.
    """
    filesystem = client(options)
    wait: Any = sync
    return cast(bytes, wait(filesystem.loop, _get, filesystem, options, bucket, key, max_bytes, byte_range))


async def _get(
    filesystem: Client,
    options: S3Options,
    bucket: str,
    key: str,
    max_bytes: int | None,
    byte_range: str | None,
) -> bytes:
    wanted: dict[str, object] = {} if byte_range is None else {"Range": byte_range}
    for i_attempt in range(options.attempts):
        response = await _send(
            filesystem, "get_object", wanted | {"Bucket": bucket, "Key": key} | options.for_reading()
        )
        try:
            announced = response["ContentLength"]
            if max_bytes is not None and announced > max_bytes:
                raise TooLargeError(announced)
            data = await response["Body"].read()
            if len(data) == announced:
                return data
            raise ConnectionError(f"the body has {len(data)} of {announced} bytes")
        except (*S3_RETRYABLE_ERRORS, ConnectionError):  # the connection broke in the body
            if i_attempt == options.attempts - 1:
                raise
        finally:
            response["Body"].close()
        await asyncio.sleep(min(20.0, 0.1 * 2**i_attempt) * secrets.randbelow(1000) / 1000)
    raise AssertionError("unreachable")
