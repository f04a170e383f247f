"""Objects in S3: client, retries, options, and the functions of `resshift.storage.files`.

Retries are those of botocore's "standard" mode: full-jitter exponential back-off up to 20 s, recognition of
SlowDown and other throttling responses, and a budget (500 tokens for a client, 5 for a retry, 1 back for a
success) that prevents retry storms when the store is down. Bodies that break while they are read are
requested again here, with the same jitter, because botocore returns the stream before it ends.

Clients are created in each process on first use and kept by s3fs; they do not survive a fork. Credentials
come from the environment or a profile, never from a URI or an option, because options are stored in job
records.
"""

# botocore and s3fs have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import contextlib
import os
import posixpath
import re
import secrets
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Literal, TypeAlias, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from fsspec.asyn import sync
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from resshift.storage.types import Entry, StorageError, StorageReason, accessing

# The inferred types of the synchronous methods of S3FileSystem are wrong: they return the response, not None.
Client: TypeAlias = Any
T = TypeVar("T")
_BAD_CONNECTIONS = 5  # largest number of successive bad connections from a pool
PART_BYTES = 64 << 20  # of a large object that is written or read at once
_MOST_PARTS = 10_000  # of an object; one PUT takes 5 GiB at most
_PARTS_AT_A_TIME = 4
_ACCESS_ERRORS = (BotoCoreError, ClientError, *S3_RETRYABLE_ERRORS)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class S3Options:
    """Options of access to a bucket, and of the objects that are written to it.

    Fields:
        endpoint: URL of a store other than AWS; null is `AWS_ENDPOINT_URL_S3`, then `AWS_ENDPOINT_URL`.
        region: Region of the bucket; null is that of the environment.
        profile: Profile of ~/.aws/config on every node.
        anonymous: Whether to send no credentials, for public buckets.
        requester_pays: Whether to pay for requests to buckets that require it.
        sse: server-side encryption of written objects, "AES256" or "aws:kms".
        sse_kms_key: Key of "aws:kms"; null is that of the account.
        storage_class: Storage class of written objects, for example "STANDARD_IA".
        attempts: Number of attempts for a request, including the first, and for a body that breaks.
        timeout_s: Timeout of a connection, and between two bytes.
        call_s: Time for a call with all its attempts; a store that sends a byte a minute keeps every other
            limit.
        connections: Largest number of connections of a process.
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
    call_s: float = 900.0
    connections: int = 32

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.connections < 1 or self.timeout_s <= 0 or self.call_s <= 0:
            got = f"{self.attempts}, {self.connections}, {self.timeout_s}, {self.call_s}"
            raise ValueError(
                f"attempts and connections must be at least 1, timeout_s and call_s positive, got {got}"
            )
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
    """Return the client of this process. s3fs keeps one for each process, thread and set of options, and
    drops them after a fork.
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
    filesystem.retries = 1  # s3fs would retry in addition to botocore, without a budget
    return filesystem


def call(options: S3Options, method: str, **arguments: object) -> dict[str, Any]:
    """Send one request and return the response."""
    filesystem = client(options)
    wait: Any = sync
    return cast(dict[str, Any], wait(filesystem.loop, _within, options, _send, filesystem, method, arguments))


async def _within(options: S3Options, work: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Await a call for as long as it may take.

    Raises:
        ConnectionError: It took longer.
    """
    deadline = asyncio.timeout(options.call_s)
    try:
        async with deadline:
            return await work(*arguments)
    except TimeoutError:
        if not deadline.expired():
            raise
        raise ConnectionError(f"the store took longer than {options.call_s:g} s for one call") from None


async def _send(filesystem: Client, method: str, arguments: Mapping[str, object]) -> dict[str, Any]:
    """Send a request, and send it again if its connection was unusable.

    A server may leave bytes on a connection that it keeps open (Swift ends the response to a HEAD that found
    nothing like a chunked body). The next request on that connection gets a bad status line, which botocore
    does not retry. All requests here may be sent twice.
    """
    for _ in range(_BAD_CONNECTIONS):
        try:
            return await filesystem._call_s3(method, **arguments)
        except HTTPClientError as error:
            if type(error) is not HTTPClientError:  # botocore has retried its subclasses already
                raise
    return await filesystem._call_s3(method, **arguments)


def split(uri: str) -> tuple[str, str]:
    """Return the bucket of a URI and its key or prefix, which may be empty.

    Raises:
        StorageError: Invalid.
    """
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(
            uri,
            StorageReason.INVALID,
            "the URI must be s3://BUCKET/KEY; credentials come from the environment",
        )
    return bucket, key


def _split_object(uri: str) -> tuple[str, str]:
    bucket, key = split(uri)
    if not key or key.endswith("/"):
        raise StorageError(uri, StorageReason.INVALID, "an object needs a key that does not end in /")
    return bucket, key


def request(uri: str, options: S3Options, method: str, **arguments: object) -> dict[str, Any]:
    """Send one request about `uri` and return the response.

    Raises:
        StorageError: The store refuses the request or cannot be reached.
    """
    with accessing(uri, *_ACCESS_ERRORS):
        return call(options, method, **arguments)


def list_entries(
    root: str, options: S3Options, start: str = "", stop: str | None = None, page_keys: int | None = None
) -> Iterator[Entry]:
    """List the objects below a prefix from `start` to before `stop`, page by page, or the one object that
    `root` is.
    """
    bucket, prefix = split(root)
    folder = _folder(prefix)
    is_empty = not start
    limit: dict[str, object] = {} if page_keys is None else {"MaxKeys": page_keys}
    token: dict[str, object] = {"StartAfter": folder + _before(start)} if start else {}
    while True:
        asked = options.for_reading() | limit | token
        page = request(root, options, "list_objects_v2", Bucket=bucket, Prefix=folder, **asked)
        for item in page.get("Contents", ()):
            is_empty = False
            key = item["Key"][len(folder) :]
            if stop is not None and key >= stop:
                return
            if not item["Key"].endswith("/") and key >= start:
                yield _entry(bucket, item["Key"], key, item["Size"], item)
        if not page.get("IsTruncated"):
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}
    if (
        is_empty
        and prefix
        and not prefix.endswith("/")
        and (found := _look_up(root, bucket, prefix, options)) is not None
    ):
        yield _entry(bucket, prefix, posixpath.basename(prefix), found["Size"], found)


def _folder(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith("/") else prefix + "/"


def _before(key: str) -> str:
    """Return a text with few keys between it and `key`, which is not empty: a store lists what comes after a
    text. The keys between the two are dropped here.
    """
    last = ord(key[-1])
    if not last:
        return key[:-1]
    # Surrogates are no characters; behind U+FFFD come emoji and little else.
    return f"{key[:-1]}{chr(0xD7FF if last == 0xE000 else last - 1)}\ufffd"


def _entry(bucket: str, key: str, relative: str, size_bytes: int, item: dict[str, Any]) -> Entry:
    return Entry(relative, f"s3://{bucket}/{key}", size_bytes, item["ETag"].strip('"'), item["LastModified"])


def uri_of(root: str, key: str) -> str:
    """Return the URI that a listing gives a key. Keys are literal: "../x" does not lead out of the root."""
    bucket, prefix = split(root)
    return f"s3://{bucket}/{_folder(prefix)}{key}"


def find_entry(uri: str, key: str, options: S3Options) -> Entry:
    """Return the entry of one object, with `key` as its key."""
    bucket, name = _split_object(uri)
    found = _look_up(uri, bucket, name, options)
    if found is None:
        raise StorageError(uri, StorageReason.MISSING, "no such object")
    return _entry(bucket, name, key, found["Size"], found)


def exists(uri: str, options: S3Options) -> bool:
    """Tell whether an object exists; a prefix or a bucket is not an object."""
    return _look_up(uri, *_split_object(uri), options) is not None


def _look_up(uri: str, bucket: str, key: str, options: S3Options) -> dict[str, Any] | None:
    """Return the item of one key in a listing, or None if there is none.

    This is not a HEAD request: the response to a HEAD that finds nothing has no body with the reason, and
    that of Swift breaks the connection.
    """
    page = request(
        uri, options, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1, **options.for_reading()
    )
    return next(
        (item for item in page.get("Contents", ()) if item["Key"] == key), None
    )  # the key itself sorts first


def read_bytes(uri: str, max_bytes: int | None, options: S3Options, byte_range: str | None = None) -> bytes:
    """Read an object, or a part of it ("bytes=0-99", RFC 9110); exactly as long as the store announced it."""
    bucket, key = _split_object(uri)
    wait: Any = sync
    with accessing(uri, *_ACCESS_ERRORS):
        filesystem = client(options)
        arguments = (filesystem, options, bucket, key, max_bytes, byte_range)
        return wait(filesystem.loop, _within, options, _get, *arguments)


def read_part(uri: str, offset: int, num_bytes: int, options: S3Options) -> bytes:
    """Read at most `num_bytes` from `offset` on; a negative offset counts from the end."""
    part = f"bytes={offset}-{offset + num_bytes - 1}" if offset >= 0 else f"bytes={offset}"
    return read_bytes(uri, None, options, part)[:num_bytes]


def open_input(uri: str, options: S3Options) -> IO[bytes]:
    """Open an object for random access; only the parts that are read are transferred."""
    bucket, key = _split_object(uri)
    with accessing(uri, *_ACCESS_ERRORS):
        return client(options).open(f"{bucket}/{key}", "rb", block_size=8 << 20)


def write_bytes(uri: str, data: bytes, options: S3Options, content_type: str | None) -> None:
    """Write a whole object by one PUT."""
    bucket, key = _split_object(uri)
    request(
        uri, options, "put_object", Bucket=bucket, Key=key, Body=data, **options.for_writing(content_type)
    )


def write_file(uri: str, source: str, options: S3Options, content_type: str | None) -> None:
    """Write a whole object with the content of a file; a large one in parts, which become an object together.

    A process that is killed leaves parts without an object, which the bucket has to be told to remove
    (AbortIncompleteMultipartUpload).
    """
    with accessing(uri):
        size_bytes = os.path.getsize(source)
    part_bytes = max(PART_BYTES, -(-size_bytes // _MOST_PARTS))
    if size_bytes <= part_bytes:
        with accessing(uri), open(source, "rb") as file:
            data = file.read()
        write_bytes(uri, data, options, content_type)
        return
    bucket, key = _split_object(uri)
    there = {"Bucket": bucket, "Key": key}
    begun = request(uri, options, "create_multipart_upload", **there, **options.for_writing(content_type))
    there["UploadId"] = begun["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with accessing(uri), open(source, "rb") as file:
            file.seek((number - 1) * part_bytes)
            data = file.read(part_bytes)
        sent = request(
            uri, options, "upload_part", **there, PartNumber=number, Body=data, **options.for_reading()
        )
        return {"PartNumber": number, "ETag": sent["ETag"]}

    try:
        with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
            parts = list(pool.map(send, range(1, -(-size_bytes // part_bytes) + 1)))
        ended = {"MultipartUpload": {"Parts": parts}}
        request(uri, options, "complete_multipart_upload", **there, **ended, **options.for_reading())
    except BaseException:
        with contextlib.suppress(StorageError):  # the first error is the one to tell
            request(uri, options, "abort_multipart_upload", **there, **options.for_reading())
        raise


def read_file(uri: str, target: str, options: S3Options) -> None:
    """Copy an object into a file, several parts at a time."""
    size_bytes = find_entry(uri, "", options).size_bytes
    with accessing(uri), open(target, "wb") as file:
        file.truncate(size_bytes)
        descriptor = file.fileno()

        def receive(offset: int) -> None:
            data = read_part(uri, offset, min(PART_BYTES, size_bytes - offset), options)
            if len(data) != min(PART_BYTES, size_bytes - offset):
                raise StorageError(uri, StorageReason.UNAVAILABLE, "it has changed while it was read")
            os.pwrite(descriptor, data, offset)

        with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
            list(pool.map(receive, range(0, size_bytes, PART_BYTES)))


def remove(uri: str, options: S3Options) -> None:
    """Delete an object if it exists."""
    bucket, key = _split_object(uri)
    request(uri, options, "delete_object", Bucket=bucket, Key=key, **options.for_reading())


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
                raise StorageError.too_large(f"s3://{bucket}/{key}", announced, max_bytes)
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
