"""Weights in every wrapping, and strict loading."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resshift.models import WeightsError, read_model_config
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
