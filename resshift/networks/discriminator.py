"""The patch discriminator of an autoencoder's training (Isola et al., "Image-to-Image Translation with
Conditional Adversarial Networks", CVPR 2017).

Strided 4x4 convolutions with leaky ReLUs end in a map of logits; each logit sees a patch of the picture
(70 x 70 pixels with three layers). Where the original normalises by batch, this one uses GroupNorm, so that a
logit does not depend on the other pictures of the micro-batch.
"""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class DiscriminatorConfig:
    """Shape of the discriminator.

    Fields:
        channels: Number of channels of the first layer, a multiple of 16.
        layers: Number of strided layers, at least 1.
    """

    channels: int = 64
    layers: int = 3

    def __post_init__(self) -> None:
        if self.channels % 16 or self.channels < 16 or self.layers < 1:
            raise ValueError(
                f"discriminator.channels must be a multiple of 16 and layers at least 1, got {self.channels} "
                f"and {self.layers}"
            )


class PatchDiscriminator(nn.Module):
    """Return the logit of "real" for each patch of a picture."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i_layer in range(1, config.layers + 1):
            wider = config.channels * min(2**i_layer, 8)
            stride = 2 if i_layer < config.layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.GroupNorm(16, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.main = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1, h, w)."""
        return self.main(x)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Return (mean relu(1 - real) + mean relu(1 + fake)) / 2: zero once real logits are above 1 and fake ones
    below -1.
    """
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
