"""Networks of another package, small and with random weights, beside that package's own call."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from spandrel import ImageModelDescriptor, ModelLoader
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SPAN import SPAN
from spandrel.architectures.SwinIR import SwinIR
from torch import Tensor, nn

from resshift.config import Sampling, from_dict, to_dict
from resshift.images import Picture, to_tensor
from resshift.models import ModelFiles, WeightsError, locate_model
from resshift.networks import foreign
from resshift.networks.config import ForeignConfig
from resshift.upscaler import Upscaler

State = Mapping[str, Any]


def esrgan(scale: int = 4, in_channels: int = 3, **fields: Any) -> nn.Module:
    """Of Real-ESRGAN's x2 the picture is unshuffled first, to 12 channels."""
    return ESRGAN(in_nc=in_channels, out_nc=3, num_filters=8, num_blocks=2, scale=scale, **fields)


def compact(in_channels: int = 3, out_channels: int = 3) -> nn.Module:
    return Compact(num_in_ch=in_channels, num_out_ch=out_channels, num_feat=8, num_conv=2, upscale=2)


def swinir() -> nn.Module:
    return SwinIR(
        img_size=16,
        window_size=8,
        depths=[1],
        num_heads=[2],
        embed_dim=8,
        upscale=2,
        upsampler="nearest+conv",
        resi_connection="1conv",
    )


CASES: dict[str, tuple[Callable[[], nn.Module], ForeignConfig]] = {
    "esrgan": (
        esrgan,
        ForeignConfig(
            architecture="ESRGAN", scale=4, smallest_px=2, supports_half=True, supports_bfloat16=True
        ),
    ),
    "esrgan-x2": (
        lambda: esrgan(in_channels=12, shuffle_factor=2),
        ForeignConfig(
            architecture="ESRGAN",
            scale=2,
            size_multiple=4,
            smallest_px=4,
            supports_half=True,
            supports_bfloat16=True,
        ),
    ),
    "compact": (
        compact,
        ForeignConfig(architecture="Compact", scale=2, supports_half=True, supports_bfloat16=True),
    ),
    "span": (
        lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2),
        ForeignConfig(architecture="SPAN", scale=2, supports_half=True, supports_bfloat16=True),
    ),
    "swinir": (
        swinir,
        ForeignConfig(
            architecture="SwinIR", scale=2, smallest_px=16, tiling="discouraged", supports_bfloat16=True
        ),
    ),
}


def state_of(network: Callable[[], nn.Module], seed: int = 0) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return network().state_dict()


def stored(path: Path, state: State) -> Path:
    """Write weights as most files of the field have them: in a section of a pickle, or as safetensors."""
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save({"params_ema": state}, path)
    return path


def upscaler(path: Path) -> Upscaler:
    return Upscaler.from_files(ModelFiles(path.stem, foreign.describe(path), path, None), device="cpu")


def tensor_of(height: int, width: int) -> Tensor:
    rng = np.random.default_rng(height * 1000 + width)
    return to_tensor(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", CASES)
def test_a_whole_picture_is_what_spandrel_makes_of_it(name: str, suffix: str, tmp_path: Path) -> None:
    make, config = CASES[name]
    path = stored(tmp_path / f"{name}{suffix}", state_of(make))
    assert foreign.describe(path) == config
    assert from_dict(ForeignConfig, to_dict(config)) == config
    up, theirs = upscaler(path), ModelLoader(device="cpu").load_from_file(path).eval()
    assert isinstance(theirs, ImageModelDescriptor)
    for size in [(33, 30), (9, 22)]:  # smaller than SwinIR takes, and odd where the picture is unshuffled
        lq = tensor_of(*size)
        # Convolutions round differently in another memory layout.
        torch.testing.assert_close(up.upscale_tensor(lq), theirs((lq + 1) / 2) * 2 - 1, atol=1e-4, rtol=0)


def test_tiles_differ_from_the_whole_only_beside_their_edges(tmp_path: Path) -> None:
    up, lq = upscaler(stored(tmp_path / "c.pth", state_of(compact))), tensor_of(100, 40)
    sampling, reach = Sampling(tile_px=40), 4  # of its four convolutions
    rows = up.plan(100, 40, sampling).rows
    assert len(rows.starts) == 3
    whole, tiled = up.upscale_tensor(lq), up.upscale_tensor(lq, sampling)
    difference = (whole - tiled).abs().amax((0, 1, 3)).view(100, 2).amax(1)
    cuts = [*rows.starts[1:], *(start + rows.tile for start in rows.starts[:-1])]
    far = [row for row in range(100) if min(abs(row + 0.5 - cut) for cut in cuts) > reach]
    assert len(far) > 60
    assert difference[far].max() < 1e-5
    assert 1e-4 < difference.max() < 0.05


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_depth_channels_and_alpha_are_kept(channels: int, dtype: type, tmp_path: Path) -> None:
    up = upscaler(stored(tmp_path / "e.pth", state_of(CASES["esrgan-x2"][0])))
    rng = np.random.default_rng(channels)
    pixels = rng.integers(0, np.iinfo(dtype).max, (11, 13, channels), dtype, endpoint=True)
    out = up(pixels)
    assert (out.dtype, out.shape) == (dtype, (22, 26, channels))
    if channels != 4:
        deep = up.upscale(Picture(pixels=pixels.astype(np.uint16) * (257 if dtype is np.uint8 else 1))).pixels
        unit = 257 if dtype is np.uint8 else 1
        assert np.abs(out.astype(float) - deep / unit).max() <= 0.51


def test_identity_is_that_of_the_weights(tmp_path: Path) -> None:
    paths = [
        stored(tmp_path / f"{i}.safetensors", state_of(compact, seed)) for i, seed in enumerate((0, 0, 1))
    ]
    first, same, other = (upscaler(path).identity for path in paths)
    assert first == same != other
    files = ModelFiles("a", foreign.describe(paths[0]), paths[0], None)
    assert files.identity() == first != replace(files, dtype="bfloat16").identity()


def test_a_precision_that_the_network_does_not_have_is_refused(tmp_path: Path) -> None:
    path = stored(tmp_path / "s.pth", state_of(swinir))
    config = foreign.describe(path)
    with pytest.raises(WeightsError, match=r"s \(SwinIR\) computes in float32, bfloat16, got float16"):
        ModelFiles("s", config, path, None, dtype="float16")
    with pytest.raises(WeightsError, match=r"is SwinIR x2, not SwinIR x4"):
        foreign.load(path, replace(config, scale=4))


def test_a_file_is_a_model_by_its_path(tmp_path: Path) -> None:
    path = stored(tmp_path / "RealSR.v3.pth", state_of(compact))
    up = Upscaler.from_pretrained(path, device="cpu")
    assert (up.name, up.scale, up.identity) == ("RealSR.v3", 2, upscaler(path).identity)
    facts = locate_model(f"{path}@bfloat16")
    assert (facts.name, facts.dtype, facts.config) == ("RealSR.v3@bfloat16", "bfloat16", up.config)


@pytest.mark.slow
def test_a_process_without_torch_asks_another_what_a_file_is(tmp_path: Path) -> None:
    path = stored(tmp_path / "c.pth", state_of(compact))
    code = (
        "import sys; from resshift.models import locate_model; found = locate_model(sys.argv[1]); "
        "print(found.identity(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [upscaler(path).identity, "False"]


class Code:
    """A pickle of this makes a directory when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.path,)


def with_code(path: Path) -> dict[str, Code]:
    return {"weight": Code(path.with_name("was-run"))}


def half_of(path: Path, state: State) -> None:
    stored(path, state)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


COMPACT = state_of(compact)
SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "text.pth": (lambda path: path.write_text("weights"), "damaged, incomplete or no file of weights"),
    "empty.pth": (lambda path: path.touch(), "damaged, incomplete or no file of weights"),
    "half.pth": (lambda path: half_of(path, COMPACT), "damaged, incomplete or no file of weights"),
    "half.safetensors": (lambda path: half_of(path, COMPACT), "cannot be read as weights: Error while"),
    "code.pth": (lambda path: torch.save(with_code(path), path), r"run code \(posix\.mkdir\), which is not"),
    "code.pkl": (lambda path: path.write_bytes(pickle.dumps(with_code(path), 2)), "it asks to run code"),
    "module.pth": (lambda path: torch.save(compact(), path), r"run code \(spandrel.*SRVGG"),
    "numbers.pth": (lambda path: torch.save({"params": {"a": 3}}, path), "does not hold a dict of tensors"),
    "strange.pth": (
        lambda path: torch.save({f"backbone.{i}.w": torch.zeros(2) for i in range(5)}, path),
        r"no architecture that spandrel knows; its keys look like backbone\.0\.w, .*2\.w, \.\.\.$",
    ),
    "missing.pth": (
        lambda path: torch.save({key: COMPACT[key] for key in list(COMPACT)[:-2]}, path),
        "looks like RealESRGAN Compact, but its weights do not fit",
    ),
    "endless.pth": (
        lambda path: torch.save(COMPACT | {"body.999999999.weight": torch.zeros(1)}, path),
        r"is no model: it has a key 'body\.999999999\.weight'",
    ),
    "inflated.pth": (
        lambda path: torch.save(COMPACT | {"body.0.weight": torch.zeros(1).expand(10**9, 3, 3, 3)}, path),
        r"is no model: its tensors have 270\d+ values in \d{4,5} bytes",
    ),
    "grey.pth": (
        lambda path: stored(path, state_of(lambda: compact(1, 1))),
        r"\(RealESRGAN Compact\) maps 1 channels to 1: a model must map 3 to 3",
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_model_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    write, message = SPECIAL[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(WeightsError, match=message) as error:
        foreign.describe(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_without_spandrel_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path / "a.pth", COMPACT)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(WeightsError, match=r"pip install 'resshift\[models\]'"):
        foreign.describe(path)


def test_only_networks_of_convolutions_get_another_memory_layout(tmp_path: Path) -> None:
    allowed = {
        name: upscaler(stored(tmp_path / f"{name}.pth", state_of(make)))
        for name, (make, _) in CASES.items()
        if name in ("esrgan", "swinir")
    }
    layouts = {
        name: {
            parameter.is_contiguous(memory_format=torch.channels_last)
            for parameter in up.renderer.network.parameters()  # type: ignore[attr-defined]
            if parameter.ndim == 4 and min(parameter.shape[1:]) > 1
        }
        for name, up in allowed.items()
    }
    assert layouts == {"esrgan": {True}, "swinir": {False}}
