"""The moving average of a network's weights.

    average <- decay average + (1 - decay) weights

and the weights themselves at the first update. `torch.optim.swa_utils.AveragedModel` computes the same, but
copies its count to the device and every buffer of the network at each update.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn


class MovingAverage:
    """The average of a network.

    Args:
        network: Network that is not wrapped; the average begins as a copy, on the same device. Its buffers
            must be constants.
        decay: In [0, 1).

    Fields:
        module: Network with the averaged weights, in evaluation mode and without gradients.
        updates: Number of updates.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(network).requires_grad_(False).eval()
        self.updates = 0
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, decay: float | None = None) -> None:
        """Take the weights of the network, which is sharded if the average is, into the average.

        Args:
            network: The network.
            decay: Decay of this update; None is that of the average.
        """
        decay = self._decay if decay is None else decay
        averages = cast(list[Tensor], list(self.module.parameters()))
        weights = [parameter.detach() for parameter in network.parameters()]
        # One kernel for many tensors, as the optimisers of torch use it.
        torch._foreach_lerp_(averages, weights, 1 - decay if self.updates else 1.0)  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        self.updates += 1
