"""The moving average is that of torch, bit by bit."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resshift.training.average import MovingAverage


def test_average_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.GroupNorm(1, 5), nn.Linear(5, 2))
    ours = MovingAverage(network, 0.9)
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):  # the first update takes the weights as they are
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        ours.update(network)
        theirs.update_parameters(network)
        for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
            assert torch.equal(a, b)
    assert ours.updates == 4
    assert not any(parameter.requires_grad for parameter in ours.module.parameters())
