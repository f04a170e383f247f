"""Checks of a bucket or folder: list, put, get and delete, and the clock of the store beside ours.

Everything goes through `resshift.storage`, with the options that a job would use. Objects are written below
URI/_resshift-doctor/ only, and deleted again.
"""

from __future__ import annotations

import itertools
import posixpath
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from resshift import storage
from resshift.doctor.finding import Finding, fail, ok, warn
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

SCRATCH = "_resshift-doctor"
_CONTENT = b"written by jobs/doctor.py, may be deleted\n"
# AWS refuses requests whose time is off by more than 15 minutes.
_WARN_SKEW_S, _FAIL_SKEW_S = 30.0, 300.0
_REMEDIES = {
    StorageReason.MISSING: "does the bucket exist, in this region and at this endpoint? "
    "--set target.endpoint=..., target.region=...",
    StorageReason.DENIED: "the role needs it on this prefix (deploy/aws/worker-policy.json); "
    "without a role set AWS_PROFILE",
    StorageReason.UNAVAILABLE: "is the endpoint right and reachable from here (AWS_ENDPOINT_URL, proxy, VPC "
    "endpoint)?",
}


def bucket_checks(
    uri: str, options: S3Options = s3.DEFAULT, *, is_read_only: bool = False
) -> Iterator[Finding]:
    """Try the operations of a job on a place.

    Args:
        uri: Bucket, prefix or folder.
        options: Options of the S3 client.
        is_read_only: Whether the place is an input: nothing is written, one object is read if there is one.
    """
    root = uri.rstrip("/")
    shown = storage.printable(root)
    try:
        first = list(itertools.islice(storage.list_entries(root, options), 1))
    except StorageError as error:
        if storage.is_s3(root) or is_read_only or error.reason != StorageReason.MISSING:
            yield _failed(f"list {shown}", "s3:ListBucket", error)
            return  # a bucket that cannot be listed cannot be resumed from: the rest would be noise
        yield ok(f"list {shown}", "not there yet; jobs make it")
        root, first = _nearest_folder(root), []
    else:
        yield ok(f"list {shown}", "allowed" if first else "allowed, and empty")
    if is_read_only:
        if first:
            yield _try_to_read(shown, first[0].uri, options)
    else:
        yield from _try_to_write(root, shown, options)
    if storage.is_s3(root):
        yield check_clock(shown, *_clocks(root, options))


def _nearest_folder(uri: str) -> str:
    """Return the folder above that exists: the doctor leaves no new ones behind."""
    while not storage.exists(uri):
        uri = posixpath.dirname(uri) or "."
    return uri


def _try_to_read(shown: str, uri: str, options: S3Options) -> Finding:
    try:
        storage.read_first_bytes(uri, 16, options)
    except StorageError as error:
        return _failed(f"get {shown}", "s3:GetObject", error)
    return ok(f"get {shown}", "allowed")


def _try_to_write(root: str, shown: str, options: S3Options) -> Iterator[Finding]:
    uri = storage.join(root, f"{SCRATCH}/{secrets.token_hex(8)}")
    try:
        storage.write_bytes(uri, _CONTENT, options)
    except StorageError as error:
        yield _failed(f"put {shown}", "s3:PutObject", error)
        return
    yield ok(f"put {shown}", "allowed")
    try:
        is_whole = storage.read_bytes(uri, options=options) == _CONTENT
    except StorageError as error:
        yield _failed(f"get {shown}", "s3:GetObject", error)
    else:
        remedy = "what was read is not what was written: is there a cache or a proxy in between?"
        yield (
            ok(f"get {shown}", "allowed, the bytes that were put")
            if is_whole
            else fail(f"get {shown}", "other bytes than were put", remedy)
        )
    try:
        storage.remove(uri, options)
    except StorageError as error:
        yield _failed(f"delete {shown}", "s3:DeleteObject", error)
        return
    yield ok(f"delete {shown}", "allowed")


def _failed(name: str, action: str, error: StorageError) -> Finding:
    remedy = f"{action}: {_REMEDIES.get(error.reason, 'see the message')}"
    if "RequestTimeTooSkewed" in error.detail or "difference between the request time" in error.detail:
        remedy = "set this machine's clock: timedatectl set-ntp true"
    return fail(name, f"{error.reason}: {error.detail}", remedy)


def _clocks(root: str, options: S3Options) -> tuple[str | None, datetime]:
    """Return the Date header of the store's answer to a listing, and our time then."""
    bucket = root.removeprefix("s3://").partition("/")[0]
    answer = s3.call(options, "list_objects_v2", Bucket=bucket, MaxKeys=1, **options.for_reading())
    return answer["ResponseMetadata"]["HTTPHeaders"].get("date"), datetime.now(UTC)


def check_clock(shown: str, date_header: str | None, ours: datetime) -> Finding:
    """Compare the Date header of the store (RFC 9110, seconds) with our time, aware."""
    name = f"clock {shown}"
    if date_header is None:
        return warn(name, "the store sends no Date", "compare by hand: `date -u` here and on another machine")
    skew_s = (ours - parsedate_to_datetime(date_header)).total_seconds()
    found = f"{skew_s:+.0f} s against the store"
    if abs(skew_s) > _FAIL_SKEW_S:
        return fail(name, found, "AWS refuses requests that are 15 minutes off: timedatectl set-ntp true")
    if abs(skew_s) > _WARN_SKEW_S:
        return warn(name, found, "timedatectl set-ntp true")
    return ok(name, found)
