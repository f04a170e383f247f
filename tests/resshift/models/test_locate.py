"""Models by name, path, bucket and repository: what is found, and what is said of what is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipelines.bulk.worker import describe_model
from resshift import storage
from resshift.models import (
    WeightsError,
    first_stage_file,
    locate_model,
    model_with,
    published,
    unet_file,
    write_model_config,
)
from resshift.models.files import float32_bytes
from resshift.presets import preset
from resshift.presets import test_x4 as toy_preset
from resshift.storage import StorageError, StorageReason
from resshift.training.step import build_network
from resshift.weights import read_state_dict, save_model, save_safetensors, state_to_store


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RESSHIFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a small model."""
    directory = tmp_path_factory.mktemp("toy") / "model"
    save_model(directory, "toy", toy_preset().model, build_network(toy_preset()))
    return directory


def upload(directory: Path, uri: str) -> None:
    for path in directory.iterdir():
        storage.write_bytes(f"{uri}/{path.name}", path.read_bytes())


def test_a_model_in_a_bucket_is_the_model_on_disk(toy: Path, bucket: str) -> None:
    upload(toy, f"{bucket}/toy")
    here, there = locate_model(toy), locate_model(f"{bucket}/toy")
    assert there.identity() == here.identity()
    assert (there.name, there.config) == (here.name, here.config)
    assert there.unet.read_bytes() == here.unet.read_bytes()
    assert locate_model(f"file://{toy}") == here
    assert locate_model(f"{bucket}/toy/").unet == there.unet
    assert locate_model(f"{bucket}/toy/model.safetensors").identity() == here.identity()
    asked = locate_model(f"{bucket}/toy@bfloat16")
    assert (asked.dtype, asked.name) == ("bfloat16", "toy@bfloat16")
    assert asked.identity() == locate_model(f"{toy}@bfloat16").identity() != here.identity()


def test_new_weights_in_a_bucket_are_another_model(toy: Path, bucket: str) -> None:
    upload(toy, f"{bucket}/toy")
    before = locate_model(f"{bucket}/toy").identity()
    data = state_to_store(build_network(toy_preset()))
    key = next(key for key, value in data.items() if value.any())
    data[key] = data[key] + 1
    save_safetensors(data, toy.parent / "other.safetensors")
    storage.write_bytes(f"{bucket}/toy/model.safetensors", (toy.parent / "other.safetensors").read_bytes())
    assert locate_model(f"{bucket}/toy").identity() != before


def test_a_run_is_its_model_and_before_the_end_its_newest_checkpoint(toy: Path, bucket: str) -> None:
    run = f"{bucket}/runs/mine"
    storage.write_bytes(f"{run}/run.json", b"{}")
    with pytest.raises(WeightsError, match="runs/mine is a run without a checkpoint yet"):
        locate_model(run)
    for step in (5, 10, 15):
        upload(toy, f"{run}/step-{step:08d}")
    for step in (5, 10):  # the third is not complete
        storage.write_bytes(f"{run}/step-{step:08d}/files.json", b"{}")
    weights = read_state_dict(toy / "model.safetensors")
    save_safetensors({key: value + 1 for key, value in weights.items()}, toy.parent / "ema.safetensors")
    ema = (toy.parent / "ema.safetensors").read_bytes()
    storage.write_bytes(f"{run}/step-00000010/ema.safetensors", ema)
    assert locate_model(run).unet.read_bytes() == ema
    upload(toy, f"{run}/model")
    assert locate_model(run).identity() == locate_model(toy).identity()


def test_what_is_not_in_a_bucket_is_told_in_one_line(toy: Path, bucket: str) -> None:
    cases = {
        f"{bucket}/nothing": r"s3://\S+/nothing is not a model directory: it has no config\.json, and no ",
        f"{bucket}/nothing.pth": r"no model at s3://\S+/nothing\.pth: there is no such file",
        "s3://no-such-bucket-at-all/x": r"no model at s3://no-such-bucket-at-all/x.*missing",
        "s3://": "must be s3://BUCKET/KEY",
    }
    for source, told in cases.items():
        with pytest.raises(WeightsError, match=told) as caught:
            locate_model(source)
        assert "\n" not in str(caught.value)
    storage.write_bytes(f"{bucket}/half/config.json", (toy / "config.json").read_bytes())
    with pytest.raises(WeightsError, match=r"half is not a complete model: it has no model.safetensors"):
        locate_model(f"{bucket}/half")
    storage.write_bytes(f"{bucket}/odd/config.json", b"{]")
    with pytest.raises(WeightsError, match=r"odd/config\.json is not a model configuration"):
        locate_model(f"{bucket}/odd")


@pytest.mark.parametrize("source", ["s3://bucket/toy", "s3://bucket/toy.pth"])
def test_a_store_that_denies_is_told(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(uri: str, *arguments: object, **options: object) -> None:
        raise StorageError(uri, StorageReason.DENIED, "Access Denied")

    monkeypatch.setattr(storage, "read_bytes", denied)
    monkeypatch.setattr(storage, "find_entry", denied)
    with pytest.raises(WeightsError, match=r"^no model at s3://bucket.*: denied: Access Denied$"):
        locate_model(source)


def test_the_one_weight_file_of_a_directory_is_its_model(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    data = (toy / "model.safetensors").read_bytes()
    (tmp_path / "one" / "any.safetensors").write_bytes(data)
    assert locate_model(tmp_path / "one").identity() == locate_model(toy).identity()
    (tmp_path / "one" / "other.safetensors").write_bytes(data)
    with pytest.raises(
        WeightsError, match=r"2 weight files \(any\.safetensors, other\.safetensors\): name one"
    ):
        locate_model(tmp_path / "one")


def test_options_travel_with_the_address() -> None:
    assert model_with("x.pth") == "x.pth"
    text = model_with("s3://b/x.pth", "realsr-x4-s15", "s3://b/vq a.pth")
    assert text == "s3://b/x.pth#preset=realsr-x4-s15&first-stage=s3://b/vq+a.pth"
    with pytest.raises(WeightsError, match=r"unknown 'prest' in x.pth#prest=a; allowed: preset, first-stage"):
        locate_model("x.pth#prest=a")
    with pytest.raises(WeightsError, match="unknown preset 'a'; allowed: realsr-x4-s15"):
        locate_model("x.pth#preset=a")


def test_a_file_whose_name_has_a_mark_is_a_file(toy: Path, tmp_path: Path) -> None:
    path = tmp_path / "a#preset=b.safetensors"
    path.write_bytes((toy / "model.safetensors").read_bytes())
    assert locate_model(path).identity() == locate_model(toy).identity()


def test_weights_of_a_network_and_of_an_autoencoder(
    toy: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(toy, f"{bucket}/toy")
    data = (toy / "model.safetensors").read_bytes()
    for source in (str(toy), f"{bucket}/toy", f"{bucket}/toy/model.safetensors"):
        assert unet_file(source).read_bytes() == data
    with pytest.raises(WeightsError, match="toy holds no autoencoder"):
        first_stage_file(f"{bucket}/toy")
    storage.write_bytes(f"{bucket}/toy/first_stage.safetensors", b"stage")
    assert first_stage_file(f"{bucket}/toy").read_bytes() == b"stage"
    storage.write_bytes(f"{bucket}/vq/model/config.json", b'{"name": "vq", "first_stage": {}}')
    storage.write_bytes(f"{bucket}/vq/model/model.safetensors", b"trained")
    assert first_stage_file(f"{bucket}/vq").read_bytes() == b"trained"
    with pytest.raises(WeightsError, match="describes an autoencoder"):
        locate_model(f"{bucket}/vq/model")
    with pytest.raises(WeightsError, match="no autoencoder 'vq': give one of vq-f4"):
        first_stage_file("vq")
    monkeypatch.delenv("RESSHIFT_ACCEPT_LICENCE", raising=False)
    with pytest.raises(WeightsError, match="RESSHIFT_ACCEPT_LICENCE"):
        first_stage_file("vq-f4")


def test_an_unknown_name_lists_the_names() -> None:
    with pytest.raises(
        WeightsError, match=r"no model 'tiny-x5': give one of .*realesrgan-x4plus.*tiny-x4.*s3://"
    ):
        locate_model("tiny-x5")


def test_weights_that_do_not_fit_into_memory_are_refused(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from resshift import Upscaler

    found = locate_model(toy)
    weights = read_state_dict(found.unet)
    needed = sum(4 * tensor.numel() for tensor in weights.values())
    found.check_memory(needed, "this machine")
    told = r"^the weights of toy need 0\.0 GB of memory, and the largest node has 0\.0 GB$"
    with pytest.raises(WeightsError, match=told):
        found.check_memory(needed - 1, "the largest node")
    monkeypatch.setattr("resshift.upscaler.machine_bytes", lambda: needed - 1)
    with pytest.raises(WeightsError, match="and this machine has"):
        Upscaler.from_pretrained(toy, device="cpu")


def test_float16_weights_count_as_float32(toy: Path, tmp_path: Path) -> None:
    half = {key: value.half() for key, value in read_state_dict(toy / "model.safetensors").items()}
    save_safetensors(half, tmp_path / "half.safetensors")
    assert float32_bytes(tmp_path / "half.safetensors") == float32_bytes(toy / "model.safetensors")


def test_a_preset_without_weights_is_told_from_a_model() -> None:
    with pytest.raises(WeightsError, match="realsr-x2-s4 is a preset without published weights: train it"):
        locate_model("realsr-x2-s4")


def test_a_model_that_needs_masks_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    write_model_config(tmp_path, "holes", preset("inpaint-imagenet-s4").model)
    assert describe_model(str(tmp_path)).fills_holes
    assert not describe_model("tiny-x4").fills_holes


# --- Hugging Face


class Hub(ThreadingHTTPServer):
    """What huggingface_hub asks of a hub to list and download files."""

    files: dict[str, bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server
        assert isinstance(hub, Hub)
        path = self.path.split("?")[0]
        if path.startswith("/api/models/me/toy"):
            siblings = [{"rfilename": name} for name in hub.files]
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in hub.files.items()
            ]
            body = json.dumps(
                tree if "/tree/" in path else {"id": "me/toy", "sha": "1" * 40, "siblings": siblings}
            )
            self._send(200, body.encode(), {"Content-Type": "application/json"})
            return
        name = path.removeprefix("/me/toy/resolve/main/")
        if name == path:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif name not in hub.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "1" * 40})
        else:
            data = hub.files[name]
            self._send(200, data, {"X-Repo-Commit": "1" * 40, "ETag": f'"{hash(data) & 0xFFFFFFFF:x}"'})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(toy: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), _Pages)
    server.files = {path.name: path.read_bytes() for path in toy.iterdir()}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_a_repository_on_a_hub_is_a_model(hub: Hub, toy: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its address when it is imported."""
    program = """if True:
        import json, sys
        from resshift.models import WeightsError, locate_model
        told = []
        for source in sys.argv[1:]:
            try:
                told.append(locate_model(source).identity())
            except WeightsError as error:
                told.append(str(error))
        print(json.dumps(told))
    """
    sources = [
        "me/toy",
        "hf://me/toy",
        "hf://me/toy@main",
        "hf://me/toy/model.safetensors",
        "hf://me/toy/absent.safetensors",
        "me/nothing",
        "hf://me",
        "hf://me/toy@",
    ]
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", program, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[:4] == [locate_model(toy).identity()] * 4
    assert found[4] == "no model at hf://me/toy/absent.safetensors: there is no such file"
    assert found[5].startswith(
        "no model 'me/nothing': there is no such path, and no model at hf://me/nothing: missing"
    )
    assert found[6] == "an address on Hugging Face is hf://OWNER/NAME, got hf://me"
    assert found[7] == "an address on Hugging Face is hf://OWNER/NAME, got hf://me/toy@"


@pytest.mark.parametrize("source", ["./nothing", "../nothing", "nothing/weights.pth"])
def test_what_can_only_be_a_path_is_not_asked_for_on_the_hub(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"no model '.*nothing.*': give one of .*, or OWNER/NAME"):
        locate_model(source)


def test_without_the_package_of_the_hub_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(WeightsError, match=r"pip install 'resshift\[models\]'"):
        locate_model("hf://me/toy")


# --- Names of published models


def test_a_released_model_is_two_files(tmp_path: Path, cache: Path) -> None:
    cache.mkdir()
    for file in (published.RELEASED["sinsr-x4-s1"].unet, published.VQ_F4):
        (cache / file.name).write_bytes(file.name.encode())
    found = locate_model("sinsr-x4-s1")
    assert (found.unet.name, found.first_stage) == ("SinSR_v1.pth", cache / "autoencoder_vq_f4.pth")
    assert found.config.steps == 1
