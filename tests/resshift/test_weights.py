"""Weights in every wrapping, strict loading, and downloads from a real server on loopback."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resshift.models import RemoteFile, WeightsError, fetch, read_model_config
from resshift.presets import test_x4 as toy_preset
from resshift.training.step import build_network
from resshift.weights import load_into, read_state_dict, save_model, save_safetensors, state_to_store

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


def small() -> nn.Module:
    module = nn.Module()
    module.a = nn.Linear(3, 2)
    return module


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_wrapping_is_read(prefix: str, wrapped: bool, tmp_path: Path) -> None:
    state: dict[str, object] = {prefix + key: value for key, value in STATE.items()}
    state |= {f"{prefix}b.attn_mask": torch.zeros(1), f"{prefix}b.relative_position_index": torch.zeros(1)}
    torch.save({"state_dict": state, "iters_start": 5} if wrapped else state, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[key], STATE[key]) for key in STATE)


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return open, ("executed.txt", "w")  # pyright: ignore[reportReturnType]


def test_code_in_a_pickle_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": torch.zeros(1), "b": _Bomb()}, tmp_path / "w.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(_Bomb()))
    for name in ("w.pth", "raw.pth"):
        with pytest.raises(WeightsError):
            read_state_dict(tmp_path / name)
    assert not (tmp_path / "executed.txt").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name.endswith("pth"):
        torch.save(STATE, path)
    else:
        save_safetensors(STATE, path)
    whole = path.read_bytes()
    for data in (b"", b"garbage", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=r"w\."):
            read_state_dict(path)
    with pytest.raises(WeightsError, match="no weight file"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="dict of tensors"):
        read_state_dict(tmp_path / "list.pth")


def test_loading_is_strict_both_ways_and_all_or_nothing() -> None:
    module = small()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    wrong: dict[str, Tensor] = {"a.weight": torch.zeros(3, 2), "c.bias": torch.zeros(1)}
    with pytest.raises(WeightsError) as error:
        load_into(module, wrong)
    for text in ("1 missing (a.bias)", "1 unexpected (c.bias)", "a.weight (3, 2) instead of (2, 3)"):
        assert text in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_stored_bytes_do_not_change_on_a_round_trip(tmp_path: Path) -> None:
    save_safetensors(STATE, tmp_path / "a.safetensors", {"a": "1"})
    read = read_state_dict(tmp_path / "a.safetensors")
    assert all(torch.equal(read[key], STATE[key]) and read[key].dtype == STATE[key].dtype for key in STATE)
    save_safetensors(dict(reversed(read.items())), tmp_path / "b.safetensors", {"a": "1"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_long_lists_of_problems_are_cut() -> None:
    extra = {f"x{i}": torch.zeros(1) for i in range(20)}
    with pytest.raises(WeightsError, match=r"20 unexpected \(x0, .*, \.\.\.\)") as error:
        load_into(small(), {**STATE, **extra})
    assert "x9" not in str(error.value)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    torch.save({**STATE, "module.a.bias": torch.zeros(2)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="with and without a wrapper prefix"):
        read_state_dict(tmp_path / "w.pth")


def test_half_precision_weights_fill_a_float32_module(tmp_path: Path) -> None:
    module = small()
    save_safetensors({key: value.half() for key, value in STATE.items()}, tmp_path / "w.safetensors")
    load_into(module, read_state_dict(tmp_path / "w.safetensors"))
    assert module.state_dict()["a.weight"].dtype == torch.float32
    assert torch.equal(module.state_dict()["a.weight"], STATE["a.weight"])


def test_derived_buffers_are_neither_stored_nor_needed(tmp_path: Path) -> None:
    network = build_network(toy_preset())
    stored = state_to_store(network)
    assert not any("relative_position_index" in key or "attn_mask" in key for key in stored)
    load_into(build_network(toy_preset()), stored)


@pytest.mark.parametrize("text", ["{", "{}", '{"name": "x", "model": {"scala": 4}}'])
def test_bad_model_configuration_is_said(text: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match="not a model configuration"):
        read_model_config(tmp_path)


def test_model_directory_is_written_with_its_configuration(tmp_path: Path) -> None:
    save_model(tmp_path, "toy", toy_preset().model, build_network(toy_preset()), dtype=torch.float16)
    assert read_model_config(tmp_path) == ("toy", toy_preset().model)
    assert {value.dtype for value in read_state_dict(tmp_path / "model.safetensors").values()} == {
        torch.float16
    }


DATA = bytes(range(256)) * 100


class Server(ThreadingHTTPServer):
    requests = 0


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
        self.send_header("Content-Length", str(len(DATA)))
        self.end_headers()
        self.wfile.write(DATA[:100] if self.path == "/cut" else DATA)

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


def test_download_is_checked_and_made_once(server: Server, tmp_path: Path) -> None:
    file = remote(server, sha256=hashlib.sha256(DATA).hexdigest())
    for _ in range(2):
        assert fetch(file, accept_licence=True, cache=tmp_path).read_bytes() == DATA
    assert server.requests == 1
    assert fetch(file, accept_licence=False, cache=tmp_path).exists()  # it is here already


def test_licence_comes_before_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Some Licence.*RESSHIFT_ACCEPT_LICENCE=1"):
        fetch(remote(server), accept_licence=False, cache=tmp_path)
    assert server.requests == 0


@pytest.mark.parametrize(
    ("path", "sha256"),
    [
        ("/w.pth", "0" * 64),
        ("/absent", None),
        ("/cut", hashlib.sha256(DATA).hexdigest()),
        ("/chunked", None),
        ("/nonsense", None),
    ],
)
def test_failed_download_leaves_nothing(
    path: str, sha256: str | None, server: Server, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError):
        fetch(remote(server, path, sha256), accept_licence=True, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_truncated_download_without_a_known_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    """Nothing to compare with, but the server said how long the file is."""
    with pytest.raises(WeightsError):
        fetch(remote(server, "/cut"), accept_licence=True, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_first_seen_checksum_is_remembered(server: Server, tmp_path: Path) -> None:
    path = fetch(remote(server), accept_licence=True, cache=tmp_path)
    path.write_bytes(b"changed behind our back")
    with pytest.raises(WeightsError, match=rf"has sha256.*delete {path} and"):
        fetch(remote(server), accept_licence=True, cache=tmp_path)
    path.unlink()
    (tmp_path / "w.pth.sha256").write_text("0" * 64)  # as if the publisher had put another file there since
    with pytest.raises(WeightsError, match=r"expected 0+: if you trust the source, delete \S+\.sha256 and"):
        fetch(remote(server), accept_licence=True, cache=tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.pth.sha256"]


def test_download_can_be_read_by_others(server: Server, tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    path = fetch(remote(server), accept_licence=True, cache=tmp_path)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
