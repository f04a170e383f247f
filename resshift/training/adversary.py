"""Adversary on frozen features (Projected GAN, Sauer et al. 2021, arXiv 2111.01007), with hinge losses.

    L_D = mean relu(1 - D(hq | y0)) + mean relu(1 + D(x0 | y0)),    L_G = -mean D(x0 | y0)

D is a small head on each of the trunk's scales (`resshift.training.efficientnet`), which gives a score at
every position; the loss is the mean over heads. The heads also see the features of y0, the picture that the
chain starts from, so they judge the detail that was added against what it was added to.

The gradient of L_G is scaled by norms of gradients at the picture, which is where all terms meet: by the
running mean of the norm of all other terms / that of L_G. The means are a part of the state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from resshift.training.efficientnet import FEATURE_CHANNELS

Features = Sequence[Tensor]
RATE, BETAS = 4e-4, (0.0, 0.99)
_KEPT = 0.95  # of the running means of norms


class AdversaryHeads(nn.Module):
    """A head for each scale: features of a picture and of y0 -> a score at every position.

    Args:
        widths: Channels inside the head of each scale.
    """

    def __init__(self, widths: Sequence[int] = (32, 64, 64, 64)) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(2 * channels, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, 1, 1)),
            )
            for channels, width in zip(FEATURE_CHANNELS, widths, strict=True)
        )

    def forward(self, features: Features, start: Features) -> tuple[Tensor, ...]:
        """Return the scores of each scale, (B, 1, h, w)."""
        return tuple(
            head(torch.cat((one, other), dim=1))
            for head, one, other in zip(self.heads, features, start, strict=True)
        )


class Adversary(nn.Module):
    """The heads of a run, and the running means of two norms: [all other terms, L_G].

    A step has the same weights in all passes, however many micro-batches it has: `renew` takes the only step
    of the power iteration that normalises them.
    """

    norms: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.heads = AdversaryHeads().eval()
        self.register_buffer("norms", torch.zeros(2))

    def forward(self, features: Features, start: Features) -> tuple[Tensor, ...]:
        """Return the scores of each scale, (B, 1, h, w)."""
        return self.heads(features, start)

    @torch.no_grad()
    def renew(self) -> None:
        """Begin a step."""
        self.heads.train()
        for layer in self.heads.modules():
            if isinstance(layer, nn.Conv2d):
                _ = layer.weight
        self.heads.eval()

    @torch.no_grad()
    def balance(self, squares: Tensor) -> Tensor:
        """Return the factor of the gradient of L_G.

        Args:
            squares: Squares of both norms over the whole batch, (2,). They enter the means if they are
                finite.
        """
        norms = squares.sqrt()
        mean = torch.where(self.norms.any(), torch.lerp(norms, self.norms, _KEPT), norms)
        self.norms.copy_(torch.where(norms.isfinite().all(), mean, self.norms))
        return self.norms[0] / self.norms[1].clamp(min=1e-12)


def adversary_optimizer(adversary: nn.Module) -> torch.optim.AdamW:
    """Return the optimiser of the heads."""
    return torch.optim.AdamW(adversary.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)


def generator_loss(scores: Sequence[Tensor]) -> Tensor:
    """Return L_G for the scores of x0."""
    return -torch.stack([score.mean() for score in scores]).mean()


def adversary_loss(of_truth: Sequence[Tensor], of_estimate: Sequence[Tensor]) -> Tensor:
    """Return L_D for the scores of hq and of x0."""
    pairs = zip(of_truth, of_estimate, strict=True)
    return torch.stack([F.relu(1 - real).mean() + F.relu(1 + fake).mean() for real, fake in pairs]).mean()


def feature_distance(features: Features, truth: Features) -> Tensor:
    """Return the mean over scales of the distance between features whose channels have unit length at every
    position, as LPIPS compares them: mean |f / |f| - f' / |f'||^2, summed over channels.
    """
    distances = [
        (F.normalize(one, dim=1) - F.normalize(other, dim=1)).square().sum(1).mean()
        for one, other in zip(features, truth, strict=True)
    ]
    return torch.stack(distances).mean()
