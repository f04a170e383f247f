"""Each thing that the doctor looks at, broken in turn: the level, and a remedy that names the way out."""

from __future__ import annotations

import http.client
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.doctor import bucket as doctor_bucket
from pipelines.doctor import cluster as doctor_cluster
from resshift import storage
from resshift.doctor import machine
from resshift.doctor.finding import Finding, Level
from resshift.storage.s3 import S3Options

GIB = machine.GIB
LOCK = "numpy==2.0.0\n    # via x\nray==2.60.0\ncolorama==0.4.6 ; sys_platform == 'win32'\nrich==14.0.0\n"
INSTALLED = {"numpy": "2.0.0", "ray": "2.60.0", "rich": "14.0.0"}


def levels(checks: Iterator[Finding]) -> dict[str, Level]:
    return {finding.name.split(" ")[0]: finding.level for finding in checks}


@pytest.mark.parametrize(
    ("finding", "level", "remedy"),
    [
        (machine.check_python((3, 11, 4)), Level.OK, ""),
        (machine.check_python((3, 10, 12)), Level.FAIL, "Python 3.11"),
        (machine.check_gpu([], False), Level.OK, ""),
        (machine.check_gpu([], True), Level.FAIL, "driver"),
        (machine.check_gpu([], True, has_amx=True), Level.FAIL, "driver"),
        (machine.check_gpu([48 * GIB, 48 * GIB], True), Level.OK, ""),
        (machine.check_gpu([48 * GIB, 2 * GIB], True), Level.WARN, "--tile 64"),
        (machine.check_memory(16 * GIB), Level.OK, ""),
        (machine.check_memory(3 * GIB), Level.WARN, "limits.memory_mb"),
        (machine.check_memory(GIB // 2), Level.FAIL, "larger machine"),
        (machine.check_disk("/tmp", 100 * GIB, 200 * GIB), Level.OK, ""),
        (machine.check_disk("/tmp", 12 * GIB, 200 * GIB), Level.WARN, "--temp-dir"),
        (machine.check_disk("/tmp", 9 * GIB, 200 * GIB), Level.FAIL, "95 %"),
        (machine.check_shared_memory(8 * GIB, 16 * GIB), Level.OK, ""),
        (machine.check_shared_memory(2 * GIB, 16 * GIB), Level.WARN, "--object-store-memory"),
        (
            machine.check_shared_memory(64 << 20, 16 * GIB),
            Level.FAIL,
            "--shm-size",
        ),  # what Docker gives by itself
        (machine.check_open_files(1 << 20), Level.OK, ""),
        (machine.check_open_files(20_000), Level.WARN, "65536"),
        (machine.check_open_files(1024), Level.FAIL, "65536"),
        (machine.check_weights(["tiny-x4"]), Level.OK, ""),
        (machine.check_weights([]), Level.FAIL, "wheel"),
        (doctor_cluster.check_ports([]), Level.OK, ""),
        (doctor_cluster.check_ports([8265]), Level.WARN, "--dashboard-port"),
        (doctor_cluster.check_exposure([("127.0.0.1", 8265)]), Level.OK, ""),
        (doctor_cluster.check_exposure([("0.0.0.0", 8265)]), Level.WARN, "--dashboard-host=127.0.0.1"),
        (doctor_cluster.check_address("auto"), Level.OK, ""),
        (doctor_cluster.check_address("http://127.0.0.1:8265"), Level.FAIL, "RAY_API_SERVER_ADDRESS"),
        (doctor_cluster.check_address("head"), Level.FAIL, "HOST:6379"),
    ],
)
def test_each_reading_has_its_level_and_remedy(finding: Finding, level: Level, remedy: str) -> None:
    assert finding.level == level
    assert remedy in finding.remedy
    assert (finding.remedy == "") == (level == Level.OK)


def test_a_cpu_with_amx_is_told_what_it_is_fast_in() -> None:
    assert "@bfloat16" in machine.check_gpu([], False, has_amx=True).found
    assert "@bfloat16" not in machine.check_gpu([], False).found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"packages": Level.OK, "versions": Level.OK}),
        ({"ray": "2.59.0"}, {"packages": Level.OK, "versions": Level.FAIL}),
        ({"rich": "13.0.0"}, {"packages": Level.OK, "versions": Level.WARN}),
        ({"numpy": "2.0.0+local"}, {"packages": Level.OK, "versions": Level.OK}),
        ({"ray": None}, {"packages": Level.FAIL, "versions": Level.OK}),
        ({"rich": None}, {"packages": Level.WARN, "versions": Level.OK}),
    ],
)
def test_versions_are_held_against_the_lock(
    change: dict[str, str | None], expected: dict[str, Level]
) -> None:
    have = {name: version for name, version in (INSTALLED | change).items() if version is not None}
    assert levels(machine.check_versions(machine.read_lock(LOCK), have)) == expected


def test_the_lock_of_the_repository_is_what_is_installed() -> None:
    lock = (Path(__file__).parents[3] / "requirements.lock").read_text()
    pins = machine.read_lock(lock)
    assert set(machine.CORE) <= set(pins)
    assert pins["ray"].startswith("2.60.")
    if sys.platform != "win32":
        assert "pywin32" not in pins  # of another platform


def test_a_lock_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a pin: ray>=2\.60"):
        machine.read_lock("ray>=2.60\n")


def _no_token(home: Path) -> None:
    del home


def _good_token(home: Path) -> None:
    (home / ".ray" / "auth_token").touch(0o600)
    (home / ".ray" / "auth_token").write_text("secret")


def _shared_token(home: Path) -> None:
    _good_token(home)
    (home / ".ray" / "auth_token").chmod(0o644)


def _empty_token(home: Path) -> None:
    (home / ".ray" / "auth_token").touch(0o600)


@pytest.mark.parametrize(
    ("make", "environment", "level"),
    [
        (_no_token, {}, Level.OK),
        (_no_token, {"RAY_AUTH_MODE": "token"}, Level.FAIL),
        (_good_token, {"RAY_AUTH_MODE": "token"}, Level.OK),
        (_shared_token, {"RAY_AUTH_MODE": "token"}, Level.WARN),
        (_empty_token, {"RAY_AUTH_MODE": "token"}, Level.FAIL),
        (_good_token, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"}, Level.WARN),
        (_good_token, {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "10.0.0.1:6379"}, Level.WARN),
        (_good_token, {"RAY_AUTH_MODE": "disabled"}, Level.OK),
    ],
)
def test_the_token_is_looked_for_where_ray_does(
    make: Callable[[Path], None], environment: dict[str, str], level: Level, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    make(tmp_path)
    finding = doctor_cluster.check_token(environment, tmp_path)
    assert finding.level == level
    assert "secret" not in finding.line()


def test_listening_sockets_are_read_from_the_kernel() -> None:
    table = (
        "  sl  local_address rem_address   st\n"
        "   0: 0100007F:2049 00000000:0000 0A 00000000:00000000\n"  # 127.0.0.1:8265
        "   1: 00000000:1F40 00000000:0000 0A 00000000:00000000\n"  # 0.0.0.0:8000
        "   2: 0100007F:C001 0100007F:2049 01 00000000:00000000\n"  # a connection
    )
    assert doctor_cluster.listeners(table) == [("127.0.0.1", 8265), ("0.0.0.0", 8000)]


def test_an_address_where_nobody_listens_is_said() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        finding = doctor_cluster.check_address(address)
    assert finding.level == Level.FAIL
    assert "security group" in finding.remedy


class Forwarder(ThreadingHTTPServer):
    """Stands before the S3 server: refuses chosen requests as S3 does, and has a clock of its own."""

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.behind = urlsplit(behind).netloc
        self.refused: Callable[[str, str], bool] = lambda method, path: False
        self.date: str | None = None

    @property
    def options(self) -> S3Options:
        return S3Options(endpoint=f"http://127.0.0.1:{self.server_port}", attempts=1)


class _Forward(BaseHTTPRequestHandler):
    server: Forwarder  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused(self.command, self.path):
            status, headers, data = (
                403,
                [],
                b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>",
            )
        else:
            connection = http.client.HTTPConnection(self.server.behind)
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            status, headers, data = answer.status, answer.getheaders(), answer.read()
            connection.close()
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                self.send_header(name, value)
        self.send_header("Date", self.server.date or self.date_time_string())
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_DELETE = do_HEAD = forward  # noqa: N815 - the names of http.server

    def log_message(self, format: str, *args: object) -> None:
        del format, args


@pytest.fixture
def store(s3: dict[str, str]) -> Iterator[Forwarder]:
    server = Forwarder(s3["AWS_ENDPOINT_URL"])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_bucket_with_every_right_passes_and_stays_empty(bucket: str, store: Forwarder) -> None:
    checks = list(doctor_bucket.bucket_checks(f"{bucket}/x4", store.options))
    assert [finding.name.split(" ")[0] for finding in checks] == ["list", "put", "get", "delete", "clock"]
    assert {finding.level for finding in checks} == {Level.OK}
    assert list(storage.list_entries(bucket)) == []


def _is_list(method: str, path: str) -> bool:
    return method == "GET" and "list-type" in path


def _is_get(method: str, path: str) -> bool:
    return method == "GET" and doctor_bucket.SCRATCH in path and "list-type" not in path


@pytest.mark.parametrize(
    ("refused", "failed", "action"),
    [
        (_is_list, "list", "s3:ListBucket"),
        (lambda method, path: method == "PUT", "put", "s3:PutObject"),
        (_is_get, "get", "s3:GetObject"),
        (lambda method, path: method == "DELETE", "delete", "s3:DeleteObject"),
    ],
)
def test_each_missing_right_is_named(
    refused: Callable[[str, str], bool], failed: str, action: str, bucket: str, store: Forwarder
) -> None:
    store.refused = refused
    found = [
        finding
        for finding in doctor_bucket.bucket_checks(bucket, store.options)
        if finding.level == Level.FAIL
    ]
    assert [finding.name.split(" ")[0] for finding in found] == [failed]
    assert action in found[0].remedy
    assert "denied" in found[0].found


def test_a_source_is_only_read(bucket: str, store: Forwarder) -> None:
    storage.write_bytes(f"{bucket}/in/a.png", b"0123456789")
    store.refused = lambda method, path: method != "GET"
    assert levels(
        doctor_bucket.bucket_checks(f"{bucket}/in", store.options, is_read_only=True)
    ) == dict.fromkeys(["list", "get", "clock"], Level.OK)
    store.refused = lambda method, path: path.endswith("a.png")
    assert (
        levels(doctor_bucket.bucket_checks(f"{bucket}/in", store.options, is_read_only=True))["get"]
        == Level.FAIL
    )


@pytest.mark.slow
def test_a_bucket_that_is_not_there_and_a_store_that_is_not_there(bucket: str, store: Forwarder) -> None:
    del bucket
    (finding,) = doctor_bucket.bucket_checks("s3://no-such-bucket-here", store.options)
    assert (finding.level, "region" in finding.remedy) == (Level.FAIL, True)
    (finding,) = doctor_bucket.bucket_checks("s3://any", S3Options(endpoint="http://127.0.0.1:9", attempts=1))
    assert (finding.level, "AWS_ENDPOINT_URL" in finding.remedy) == (Level.FAIL, True)


@pytest.mark.parametrize(
    ("date", "level"),
    [
        ("Wed, 25 Nov 2026 12:00:00 GMT", Level.OK),
        ("Wed, 25 Nov 2026 12:01:00 GMT", Level.WARN),
        ("Wed, 25 Nov 2026 11:40:00 GMT", Level.FAIL),
        (None, Level.WARN),
    ],
)
def test_skew_is_measured_against_the_header(date: str | None, level: Level) -> None:
    assert (
        doctor_bucket.check_clock("s3://b", date, datetime(2026, 11, 25, 12, 0, 1, tzinfo=UTC)).level == level
    )


def test_skew_is_read_from_the_store(bucket: str, store: Forwarder) -> None:
    store.date = "Wed, 25 Nov 2015 12:00:00 GMT"
    found = [
        finding for finding in doctor_bucket.bucket_checks(bucket, store.options) if finding.level != Level.OK
    ]
    assert [finding.name.split(" ")[0] for finding in found] == ["clock"]
    assert "timedatectl" in found[0].remedy


def test_a_folder_that_jobs_will_make_is_not_made(tmp_path: Path) -> None:
    checks = list(doctor_bucket.bucket_checks(str(tmp_path / "new" / "folder")))
    assert [finding.name.split(" ")[0] for finding in checks] == ["list", "put", "get", "delete"]
    assert {finding.level for finding in checks} == {Level.OK}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_nodes_answer_for_themselves_and_a_wrong_token_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    import ray

    checks = list(doctor_cluster.node_checks(None))
    address = ray.nodes()[0]["NodeManagerAddress"]
    assert {f"{address} python", f"{address} shared memory", f"{address} S3 environment"} <= {
        finding.name for finding in checks
    }
    head = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RAY_ADDRESS": head}
    joined = doctor_cluster.check_cluster(environment)
    assert joined.level == Level.OK
    assert joined.found.startswith("1 nodes, 6 CPUs, 0 GPUs")
    (tmp_path / "home").mkdir()
    stranger = environment | {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path / "home")}
    assert doctor_cluster.check_cluster(stranger).level == Level.FAIL


def test_the_command_prints_lines_and_ends_with_3_when_something_failed(
    job: Callable[..., int], bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert job("doctor", bucket) == 0
    assert "ok    delete s3://" in capsys.readouterr().out
    assert job("doctor", "--read", "s3://no-such-bucket-here") == 3
    shown = capsys.readouterr().out
    assert "fail  list s3://no-such-bucket-here: missing" in shown
    assert shown.splitlines()[-1].endswith("1 fail")
    assert job("doctor", "--lock", "no/such/lock") == 2
    assert job("doctor", "--set", "target.see=1") == 2
