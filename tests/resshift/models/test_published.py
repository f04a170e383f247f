"""Published weights, downloaded from a real server on loopback."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from resshift.models import RemoteFile, WeightsError, fetch
from resshift.models.published import FIRST_STAGES, FOREIGN, RELEASED
from resshift.presets import PRESETS

DATA = bytes(range(256)) * 100


class Server(ThreadingHTTPServer):
    requests = 0
    data = DATA


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests += 1
        if self.path == "/absent":
            self.send_error(404)
            return
        if self.path == "/chunked":  # a proxy that dies in the middle: no length was promised
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"1000\r\n" + DATA[:100])
            return
        if self.path == "/nonsense":
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.data)))
        self.end_headers()
        self.wfile.write(DATA[:100] if self.path == "/cut" else server.data)

    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        """Answer one request and hang up."""
        self.handle_one_request()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    http = Server(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield http
    http.shutdown()
    http.server_close()


def remote(server: Server, path: str = "/w.pth", sha256: str | None = None) -> RemoteFile:
    return RemoteFile("w.pth", f"http://127.0.0.1:{server.server_port}{path}", "Some Licence", sha256)


def stored(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "blobs").glob("*"))


def test_download_is_checked_and_made_once(server: Server, tmp_path: Path) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    file = remote(server, sha256=digest)
    for _ in range(2):
        assert fetch(file, accept_licence=True, directory=tmp_path).read_bytes() == DATA
    assert server.requests == 1
    assert stored(tmp_path) == [f"{digest}.pth"]
    assert fetch(file, accept_licence=False, directory=tmp_path).exists()  # it is here already


def test_licence_comes_before_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Some Licence.*RESSHIFT_ACCEPT_LICENCE=1"):
        fetch(remote(server), accept_licence=False, directory=tmp_path)
    assert server.requests == 0


def test_a_permissive_licence_is_not_asked_for(server: Server, tmp_path: Path) -> None:
    file = RemoteFile("w.pth", remote(server).url, "BSD-3-Clause", is_permissive=True)
    assert fetch(file, accept_licence=False, directory=tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    ("path", "sha256", "told"),
    [
        ("/w.pth", "0" * 64, "has sha256"),
        ("/absent", None, "404"),
        ("/cut", hashlib.sha256(DATA).hexdigest(), "ended after 100 of 25600 bytes"),
        ("/cut", None, "ended after 100 of 25600 bytes"),  # nothing to compare with but the length
        ("/chunked", None, "could not be downloaded"),
        ("/nonsense", None, "could not be downloaded"),
    ],
)
def test_failed_download_leaves_nothing(
    path: str, sha256: str | None, told: str, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=told):
        fetch(remote(server, path, sha256), accept_licence=True, directory=tmp_path)
    assert stored(tmp_path) == []


def test_who_has_no_network_is_told_from_where_to_where(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=rf"{remote(server, '/absent').url}.*put it at {tmp_path}/w.pth"):
        fetch(remote(server, "/absent"), accept_licence=True, directory=tmp_path)
    (tmp_path / "w.pth").write_bytes(DATA)
    assert fetch(remote(server, "/absent"), accept_licence=False, directory=tmp_path) == tmp_path / "w.pth"
    known = remote(server, "/absent", sha256="0" * 64)
    with pytest.raises(WeightsError, match=rf"{tmp_path}/w.pth has sha256 .*, expected 0+: delete it"):
        fetch(known, accept_licence=True, directory=tmp_path)


def test_first_seen_checksum_is_remembered(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server), accept_licence=True, directory=tmp_path)
    path.write_bytes(b"changed behind our back")
    assert fetch(remote(server), accept_licence=True, directory=tmp_path).read_bytes() == DATA  # once more
    server.data = b"another file" * 100  # what the publisher has put there since
    path.unlink()
    with pytest.raises(WeightsError, match=r"if you trust the source, delete (\S+)\.json and"):
        fetch(remote(server), accept_licence=True, directory=tmp_path)
    assert stored(tmp_path) == []
    for record in (tmp_path / "origins").iterdir():
        record.unlink()
    assert fetch(remote(server), accept_licence=True, directory=tmp_path).read_bytes() == server.data


def test_download_can_be_read_by_others(server: Server, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = fetch(remote(server), accept_licence=True, directory=tmp_path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_names_lead_to_presets_and_no_two_files_have_one_name() -> None:
    assert {one.preset for one in RELEASED.values()} <= set(PRESETS)
    files = {one.unet for one in RELEASED.values()} | set(FIRST_STAGES.values()) | set(FOREIGN.values())
    assert len({file.name for file in files}) == len(files)
    assert {one.first_stage for one in RELEASED.values()} <= set(FIRST_STAGES.values())
    assert not RELEASED.keys() & FOREIGN.keys()
