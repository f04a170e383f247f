"""Storage: the same claims for a directory and for a bucket, then what only one of them can do wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import s3fs

from resshift import storage
from resshift.storage import (
    StorageError,
    StorageReason,
    exists,
    first_key,
    is_inside,
    join,
    list_entries,
    printable_key,
    read_bytes,
    write_bytes,
)
from resshift.storage import s3 as s3_store
from resshift.storage.s3 import S3Options

AWKWARD_KEYS = (
    "a.png",
    "a/b.png",
    "a/b/c.png",
    "a-b.png",
    "a b/c d.png",
    "-rf.png",
    ".hidden.png",
    "emoji 🖼️.png",
    "日本語/写真.png",
    "percent%20#?.png",
    "plus+and&amp;.png",
    "quote'\"<x>.png",
)


@pytest.fixture(params=["local", "file", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('bucket')}/pre fix"
    (tmp_path / "pre fix").mkdir()
    return f"{'file://' if request.param == 'file' else ''}{tmp_path}/pre fix"


def reason_of(action: Callable[[], object]) -> StorageReason:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value.reason


def test_keys_that_differ_have_texts_that_differ() -> None:
    pieces = ("\\", "\udcff", "udcff", "\udc80", "a")
    keys = ["".join(some) for number in range(5) for some in itertools.product(pieces, repeat=number)]
    assert len({printable_key(key) for key in keys}) == len(set(keys))
    assert printable_key(r"folder\photo.png") == r"folder\photo.png"


def test_listing_is_complete_in_byte_order_and_readable(root: str) -> None:
    for key in AWKWARD_KEYS:
        write_bytes(join(root, key), key.encode())
    entries = list(list_entries(root))
    assert [entry.key for entry in entries] == sorted(AWKWARD_KEYS, key=str.encode)
    for entry in entries:
        assert read_bytes(entry.uri) == entry.key.encode()
        assert entry.uri == join(root, entry.key)
        assert entry.size_bytes == len(entry.key.encode())
        assert entry.etag
        assert entry.irregular is None
        assert entry.modified.tzinfo is not None
    assert list(list_entries(f"{root}/")) == entries


@pytest.mark.slow
def test_a_part_of_a_listing_is_that_part(root: str) -> None:
    """From every key to before every other, and between keys that do not exist."""
    for key in AWKWARD_KEYS:
        write_bytes(join(root, key), b"x")
    keys = sorted(AWKWARD_KEYS)
    ends = [*keys[::4], "a", "a/", "a0", "\U0001f5bb", "\ue000"]
    for start in ["", *ends]:
        for stop in [None, *ends]:
            expected = [key for key in keys if start <= key and (stop is None or key < stop)]
            assert [entry.key for entry in list_entries(root, start=start, stop=stop)] == expected
            assert first_key(root, start=start, stop=stop) == next(iter(expected), None)


def test_listing_one_file_gives_its_name(root: str) -> None:
    write_bytes(join(root, "x/y.png"), b"abc")
    (entry,) = list_entries(join(root, "x/y.png"))
    assert (entry.key, entry.size_bytes, read_bytes(entry.uri)) == ("y.png", 3, b"abc")


def test_etag_changes_with_the_content(root: str) -> None:
    uri = join(root, "a.png")
    write_bytes(uri, b"one")
    before = next(list_entries(root)).etag
    write_bytes(uri, b"two, longer")
    assert next(list_entries(root)).etag != before


def test_write_replaces_and_exists_tells(root: str) -> None:
    uri = join(root, "deep/er/a.bin")
    assert not exists(uri)
    write_bytes(uri, b"old")
    write_bytes(uri, b"")
    assert exists(uri)
    assert read_bytes(uri) == b""


def test_read_limits_are_checked_before_reading(root: str) -> None:
    uri = join(root, "a.bin")
    write_bytes(uri, b"x" * 100)
    assert len(read_bytes(uri, max_bytes=100)) == 100
    assert reason_of(lambda: read_bytes(uri, max_bytes=99)) is StorageReason.TOO_LARGE


def test_a_part_is_read_and_nothing_else(root: str) -> None:
    uri = join(root, "parts.bin")
    write_bytes(uri, bytes(range(100)))
    assert storage.read_range(uri, 0, 100) == bytes(range(100))
    assert storage.read_range(uri, 17, 5) == bytes(range(17, 22))
    assert storage.read_range(uri, -8, 8) == bytes(range(92, 100))
    assert storage.read_range(uri, -8, 3) == bytes(range(92, 95))
    assert storage.read_range(uri, -500, 500) == bytes(range(100))
    assert reason_of(lambda: storage.read_range(uri, 90, 11)) is StorageReason.INVALID
    assert reason_of(lambda: storage.read_range(join(root, "absent"), 0, 1)) is StorageReason.MISSING


def test_missing_file_is_missing(root: str) -> None:
    assert reason_of(lambda: read_bytes(join(root, "no.png"))) is StorageReason.MISSING


def test_whatever_a_bucket_lists_is_found_by_its_key(bucket: str) -> None:
    keys = ["a//b.png", "a/b.png", "//two.png", "a/../b.png", "/lead.png", "../up.png", "./dot.png", "b.png"]
    for i, key in enumerate(keys):
        write_bytes(f"{bucket}/in/{key}", bytes(i + 1))
    for root in (f"{bucket}/in", f"{bucket}/in/", bucket, f"{bucket}/in//"):
        listed = list(list_entries(root))
        assert len(listed) == (2 if root.endswith("//") else len(keys))
        assert [storage.find_entry(root, entry.key) for entry in listed] == listed
    for i, key in enumerate(keys):
        assert len(read_bytes(storage.find_entry(f"{bucket}/in", key).uri)) == i + 1
    assert reason_of(lambda: storage.find_entry(f"{bucket}/in", "../in/b.png")) is StorageReason.MISSING
    for key in ("", "in/"):
        assert reason_of(lambda key=key: storage.find_entry(bucket, key)) is StorageReason.INVALID


def test_a_key_that_leads_out_of_a_folder_is_not_looked_up(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "b.png").write_bytes(b"x")
    for key in ("../b.png", "/b.png", str(tmp_path / "b.png"), "//b.png", "a/../../b.png", ""):
        for root in (f"{tmp_path}/in", f"file://{tmp_path}/in"):
            with pytest.raises(StorageError, match="invalid"):
                storage.find_entry(root, key)


def test_missing_root_is_missing(s3: dict[str, str], tmp_path: Path) -> None:
    assert reason_of(lambda: list(list_entries("s3://no-such-bucket-here/x"))) is StorageReason.MISSING
    assert reason_of(lambda: list(list_entries(str(tmp_path / "no")))) is StorageReason.MISSING


def test_empty_root_lists_nothing(bucket: str, tmp_path: Path) -> None:
    assert list(list_entries(bucket)) == []
    assert list(list_entries(f"{bucket}/nothing")) == []
    assert list(list_entries(str(tmp_path))) == []


def test_bucket_listing_streams_page_by_page(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(7):
        write_bytes(f"{bucket}/p/{i}.png", b"x")
    pages: list[int] = []
    original = s3_store.call

    def small_pages(options: S3Options, method: str, **arguments: object) -> dict[str, Any]:
        page = original(options, method, MaxKeys=3, **arguments)
        pages.append(len(page["Contents"]))
        return page

    monkeypatch.setattr(s3_store, "call", small_pages)
    entries = list_entries(f"{bucket}/p")
    assert [entry.key for entry in itertools.islice(entries, 2)] == ["0.png", "1.png"]
    assert pages == [3]
    assert len(list(entries)) == 5
    assert pages == [3, 3, 1]


def test_bucket_listing_skips_markers_and_neighbouring_prefixes(bucket: str) -> None:
    filesystem = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for key in ("a/", "a/x.png", "ab/y.png", "a/sub/"):
        filesystem.call_s3("put_object", Bucket=bucket[5:], Key=key, Body=b"")
    assert [entry.key for entry in list_entries(f"{bucket}/a")] == ["x.png"]


def test_unreachable_store_is_unavailable_and_says_no_secret(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-secret")
    with pytest.raises(StorageError) as caught:
        read_bytes("s3://some-bucket/a.png", options=S3Options(attempts=1))
    assert caught.value.reason is StorageReason.UNAVAILABLE
    assert "hidden-secret" not in str(caught.value)


def test_credentials_in_a_uri_are_refused_and_masked() -> None:
    with pytest.raises(StorageError) as caught:
        read_bytes("s3://AKIA:hidden@bucket/a.png")
    assert caught.value.reason is StorageReason.INVALID
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["", "gs://b/a", "https://host/a.png", "file://relative", "s3://", "s3://x", "a\0b"]
)
def test_unknown_uri_is_invalid(uri: str) -> None:
    assert reason_of(lambda: read_bytes(uri)) is StorageReason.INVALID


def test_irregular_files_are_listed_but_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "directory.png").mkdir()
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "sub" / "file.png").write_bytes(b"x")
    (tmp_path / "link.png").symlink_to("sub/file.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.png"))
    with server:
        found = {entry.key: entry.irregular for entry in list_entries(str(tmp_path))}
        for key in ("fifo.png", "socket.png", "sub"):
            assert reason_of(lambda key=key: read_bytes(str(tmp_path / key))) is StorageReason.IRREGULAR
    assert found.keys() == {
        "fifo.png",
        "broken.png",
        "itself.png",
        "sub/up",
        "sub/file.png",
        "link.png",
        "socket.png",
    }
    assert found["sub/file.png"] is None
    assert found["link.png"] is None
    assert found["fifo.png"] == "not a regular file: FIFO"
    assert found["socket.png"] == "not a regular file: socket"
    assert found["sub/up"] == "link to a directory above it"
    assert str(found["broken.png"]).startswith("broken link")
    assert str(found["itself.png"]).startswith("broken link")
    assert reason_of(lambda: read_bytes(str(tmp_path / "broken.png"))) is StorageReason.MISSING


def test_unreadable_directory_is_one_irregular_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "z.png").write_bytes(b"x")
    original = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    entries = list(list_entries(str(tmp_path)))
    assert [(entry.key, entry.irregular) for entry in entries] == [
        ("closed", "unreadable directory: Permission denied"),
        ("z.png", None),
    ]
    assert reason_of(lambda: list(list_entries(str(tmp_path / "closed")))) is StorageReason.DENIED


def test_undecodable_names_are_listed_and_read(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / name).write_bytes(b"x")
    (entry,) = list_entries(str(tmp_path))
    assert entry.key == name
    assert read_bytes(entry.uri) == b"x"
    str(StorageError(entry.uri, StorageReason.MISSING, "x")).encode()  # printable whatever the name


def test_undecodable_key_is_invalid_for_a_bucket(bucket: str) -> None:
    assert (
        reason_of(lambda: write_bytes(f"{bucket}/{os.fsdecode(b'caf' + bytes([0xE9]))}", b"x"))
        is StorageReason.INVALID
    )


def test_local_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")

    def fail(source: str, destination: str) -> None:
        assert Path(source).read_bytes() == b"new"
        assert target.read_bytes() == b"old"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert reason_of(lambda: write_bytes(str(target), b"new")) is StorageReason.FULL
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_left_over_temporary_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / ".resshift-0123456789abcdef.partial").write_bytes(b"x")
    assert list(list_entries(str(tmp_path))) == []


def test_local_write_keeps_the_usual_permissions_and_long_names(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 251 + ".png")
    write_bytes(str(target), b"x")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~umask
    assert reason_of(lambda: write_bytes(str(tmp_path / ("n" * 300)), b"x")) is StorageReason.INVALID
    assert reason_of(lambda: write_bytes(str(tmp_path), b"x")) is StorageReason.IRREGULAR
    assert reason_of(lambda: write_bytes(str(target / "below"), b"x")) is StorageReason.INVALID


@pytest.mark.parametrize("key", ["", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "a\0b"])
def test_join_refuses_keys_that_escape(key: str) -> None:
    for root in ("/data", "s3://bucket/x", "relative"):
        assert reason_of(lambda root=root: join(root, key)) is StorageReason.INVALID


def test_join_refuses_two_names_for_one_file() -> None:
    assert join("s3://bucket/x/", "a//b") == "s3://bucket/x/a//b"
    for key in ("a//b", "./a", "a/"):
        assert reason_of(lambda key=key: join("/data", key)) is StorageReason.INVALID


@pytest.mark.parametrize(
    ("child", "parent", "expected"),
    [
        ("s3://b/a/x", "s3://b/a", True),
        ("s3://b/a", "s3://b/a/", True),
        ("s3://b/a", "s3://b", True),
        ("s3://b/ab", "s3://b/a", False),
        ("s3://b/a", "s3://b/a/x", False),
        ("s3://c/a", "s3://b", False),
        ("s3://b/c/../a/x", "s3://b/a", True),
        ("s3://b/a/../c", "s3://b/a", True),
        ("/d/a/x", "/d/a", True),
        ("/d/a/", "/d/a", True),
        ("/d/ab", "/d/a", False),
        ("/d/b/../a/x", "/d/a/", True),
        ("file:///d/a/x", "/d/a", True),
        ("/d", "/", True),
        ("/d/a", "s3://b/d", False),
    ],
)
def test_is_inside(child: str, parent: str, expected: bool) -> None:
    assert is_inside(child, parent) is expected


def test_is_inside_resolves_links_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "alias").symlink_to("src")
    assert is_inside(str(tmp_path / "alias" / "new" / "out"), str(tmp_path / "src"))
    monkeypatch.chdir(tmp_path)
    assert is_inside("src/out", str(tmp_path / "src"))
    assert not is_inside("out", "src")


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(StorageError("s3://b/x", StorageReason.DENIED, "no")))
    assert (error.uri, error.reason, str(error)) == ("s3://b/x", StorageReason.DENIED, "s3://b/x: denied: no")


def test_removing_is_quiet_and_leaves_no_empty_directory(tmp_path: Path, bucket: str) -> None:
    for root in (str(tmp_path / "root"), bucket):
        for name in ("a/1", "a/2"):
            storage.write_bytes(f"{root}/{name}", b"x")
        storage.remove(f"{root}/a/1")
        storage.remove(f"{root}/a/1")  # it is gone already
        assert [entry.key for entry in storage.list_entries(root)] == ["a/2"]
        storage.remove(f"{root}/a/2")
    assert not (tmp_path / "root" / "a").exists()
    with pytest.raises(StorageError, match=r"denied|invalid|irregular|unavailable"):
        storage.remove(str(tmp_path))


def test_a_store_that_sends_byte_by_byte_ends_with_the_time_of_a_call(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    del s3  # its credentials
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nETag: x\r\n\r\n"

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(head)
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(StorageError, match=r"longer than 0\.5 s for one call") as caught:
            read_bytes("s3://some-bucket/a.png", options=S3Options(call_s=0.5))
        assert caught.value.reason is StorageReason.UNAVAILABLE
        assert time.monotonic() - began < 25


def test_bytes_left_on_a_connection_do_not_fail_the_next_request(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swift ends a HEAD that found nothing like a body in chunks."""
    head = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    requests: list[bytes] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(65536):
                requests.append(data)
                connection.sendall(head)
                time.sleep(0.05)
                connection.sendall(b"0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        for _ in range(4):
            with pytest.raises(StorageError) as caught:
                s3_store.request(
                    "s3://b/a", S3Options(attempts=2), "head_object", Bucket="some-bucket", Key="a"
                )
            assert caught.value.reason is StorageReason.MISSING
            time.sleep(0.1)
    assert len(requests) >= 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (S3Options(), {}),
        (
            S3Options(sse="AES256", storage_class="STANDARD_IA"),
            {"ServerSideEncryption": "AES256", "StorageClass": "STANDARD_IA"},
        ),
        (S3Options(sse="aws:kms", sse_kms_key="k"), {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "k"}),
        (S3Options(requester_pays=True), {"RequestPayer": "requester"}),
    ],
)
def test_written_objects_get_what_the_options_say(options: S3Options, expected: dict[str, str]) -> None:
    assert options.for_writing("image/png") == {"ContentType": "image/png"} | expected
    assert options.for_reading() == ({"RequestPayer": "requester"} if options.requester_pays else {})


def test_encryption_class_and_type_reach_the_store(bucket: str) -> None:
    options = S3Options(sse="AES256", storage_class="STANDARD_IA")
    write_bytes(f"{bucket}/a.png", b"x", options, "image/png")
    found = s3_store.request(bucket, options, "head_object", Bucket=bucket[5:], Key="a.png")
    assert (found["ServerSideEncryption"], found["StorageClass"], found["ContentType"]) == (
        "AES256",
        "STANDARD_IA",
        "image/png",
    )


def test_the_endpoint_of_the_options_wins(
    bucket: str, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    options = S3Options(endpoint=s3["AWS_ENDPOINT_URL"], region="us-east-1")
    write_bytes(f"{bucket}/a.png", b"xyz", options)
    assert storage.read_first_bytes(f"{bucket}/a.png", 2, options) == b"xy"
    assert storage.find_entry(bucket, "a.png", options).size_bytes == 3


def test_bad_options_name_the_value() -> None:
    with pytest.raises(ValueError, match="got 0, 32"):
        S3Options(attempts=0)
    with pytest.raises(ValueError, match="sse_kms_key needs sse=aws:kms, got sse=None"):
        S3Options(sse_kms_key="k")
