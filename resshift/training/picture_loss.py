"""The loss of an estimated picture against the truth, and what an adversary says about it.

    d    = picture - hq
    loss = c_charbonnier mean sqrt(d^2 + epsilon^2) + c_fourier mean |F d|      F orthonormal, in each channel
         + c_lpips LPIPS(clamp(picture), hq) + c_features (distance of features of EfficientNet-Lite0)
         + c_lattice (L + S / 2)                           L and S: `resshift.training.lattice`
         + c_artifacts mean(M |clamp(picture) - hq|)       M: `artifact_map`

(Charbonnier et al. 1994; distance of spectra as in Cho et al., ICCV 2021; artifacts as in Liang et al., CVPR
2022, without the comparison with averaged weights.) The gradient stops at the picture.
There it meets that of the adversary (`resshift.training.adversary`), and the caller brings their sum to the
network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resshift.config import LossConfig
from resshift.metrics.lpips import Lpips
from resshift.training.adversary import Adversary, Features, adversary_loss, feature_distance, generator_loss
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.lattice import patterns

EPSILON = 1e-3  # pixels are in [-1, 1]
_NEIGHBOURHOOD_PX = 7
Heads = Callable[[Features, Features], tuple[Tensor, ...]]


class Judged(NamedTuple):
    """What is said about a picture.

    Fields:
        terms: Means over the batch for the log, without their weights: "loss" (the weighted sum without the
            adversary), the terms of the loss that have a weight, "fooled" (L_G) and "seen" (L_D).
        gradient: Gradient of "loss" at the picture.
        pull: Gradient of L_G at the picture; None without an adversary.
        seen: L_D, with a gradient for the heads; None without an adversary.
    """

    terms: dict[str, Tensor]
    gradient: Tensor
    pull: Tensor | None = None
    seen: Tensor | None = None


class PictureLoss:
    """The loss, see the module.

    Args:
        lpips: LPIPS network; required if `lpips` has a weight.
        trunk: EfficientNet-Lite0; required if `features` or `adversary` has a weight.
        periods: Pixels of a position along a side, of the latent and of the coarsest level of the network;
            required if `lattice` has a weight.
    """

    def __init__(
        self,
        lpips: Lpips | None = None,
        trunk: EfficientNetLite0 | None = None,
        periods: tuple[int, int] = (1, 1),
    ) -> None:
        self.lpips = lpips
        self.trunk = trunk
        self.periods = periods

    def __call__(
        self,
        estimate: Tensor,
        hq: Tensor,
        start: Tensor,
        loss: LossConfig,
        corner: tuple[int, int] = (0, 0),
        adversary: Adversary | None = None,
        heads: Heads | None = None,
    ) -> Judged:
        """Judge a picture.

        Args:
            estimate: Estimated picture, about [-1, 1], (B, 3, H, W); it gets no gradient.
            hq: The truth, of the same shape.
            start: Picture that the chain starts from, of the same shape.
            loss: Weights of the terms.
            corner: Row and column of the first pixel that LPIPS sees.
            adversary: Adversary, if it has a weight.
            heads: The same with its DDP wrapper, through which its own gradient goes; None is `adversary`.
        """
        picture = estimate.float().detach().requires_grad_()
        difference = picture - hq
        terms = {"charbonnier": (difference.square() + EPSILON**2).sqrt().mean()}
        if loss.fourier:
            terms["fourier"] = torch.fft.rfft2(difference, norm="ortho").abs().mean()
        if loss.lpips:
            assert self.lpips is not None
            seen = (..., slice(corner[0], None), slice(corner[1], None))
            terms["lpips"] = self.lpips(picture.clamp(-1, 1)[seen], hq[seen]).mean()
        if loss.lattice:
            terms["lattice"] = patterns(picture, *self.periods)
        if loss.artifacts:
            # M grows with the square of the error: beyond the range few pixels would be all of the gradient.
            shown = picture.clamp(-1, 1) - hq
            terms["artifacts"] = (artifact_map(shown.detach()) * shown.abs()).mean()
        of_truth = of_estimate = of_start = ()
        if loss.features or adversary is not None:
            assert self.trunk is not None
            of_estimate = self.trunk(picture)
            with torch.no_grad():
                of_truth = self.trunk(hq)
                of_start = self.trunk(start.float()) if adversary is not None else ()
        if loss.features:
            terms["features"] = feature_distance(of_estimate, of_truth)
        total = torch.stack([getattr(loss, name) * term for name, term in terms.items()]).sum()
        (gradient,) = torch.autograd.grad(total, picture, retain_graph=adversary is not None)
        told = {"loss": total.detach()} | {name: term.detach() for name, term in terms.items()}
        if adversary is None:
            return Judged(told, gradient)
        adversary.requires_grad_(False)
        fooled = generator_loss(adversary(of_estimate, of_start))
        (pull,) = torch.autograd.grad(fooled, picture)
        adversary.requires_grad_(True)
        # One pass for both pictures: DDP expects one before each of its backward passes.
        both = [torch.cat((real, fake.detach())) for real, fake in zip(of_truth, of_estimate, strict=True)]
        twice = [torch.cat((one, one)) for one in of_start]
        scores = [score.chunk(2) for score in (heads or adversary)(both, twice)]
        seen_loss = adversary_loss([real for real, _ in scores], [fake for _, fake in scores])
        return Judged(
            told | {"fooled": fooled.detach(), "seen": seen_loss.detach()}, gradient, pull, seen_loss
        )


def artifact_map(difference: Tensor) -> Tensor:
    """Return how much a pixel looks like an artifact of an adversary: where the error changes from pixel to
    pixel. Texture that is wrong has that too, blur has not.

        M = var(e)^(1/5) var_7x7(e)     e = sum over the channels of |d|

    Args:
        difference: d, picture - hq, (B, C, H, W).

    Returns:
        (B, 1, H, W); beyond the edges the error goes on mirrored.
    """
    error = difference.abs().sum(1, keepdim=True)
    around = F.pad(error, (_NEIGHBOURHOOD_PX // 2,) * 4, mode="reflect")
    mean, square = (F.avg_pool2d(x, _NEIGHBOURHOOD_PX, 1) for x in (around, around.square()))
    local = (square - mean.square()).clamp(min=0)
    return error.var((1, 2, 3), keepdim=True) ** 0.2 * local
