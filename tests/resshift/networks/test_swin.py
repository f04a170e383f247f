"""Windows of attention: the biases are those of the weights, whatever changed them."""

from __future__ import annotations

import copy

import pytest
import torch

from resshift.networks.swin import WindowAttention


@pytest.mark.parametrize("training", [True, False])
def test_biases_follow_an_optimiser_that_counts_no_versions(training: bool) -> None:
    """Passes without gradients between the steps of a fused optimiser, as a student of a chain has them."""
    torch.manual_seed(0)
    attention = WindowAttention(32, 4, 2)
    optimizer = torch.optim.AdamW(attention.parameters(), lr=0.1, fused=True)
    x = torch.randn(1, 8, 8, 32)
    for _ in range(3):
        attention.train(training)
        with torch.no_grad():
            found, expected = attention(x, None), copy.deepcopy(attention).requires_grad_(False)
            expected.load_state_dict(attention.state_dict())  # counts a version, so nothing is kept
            torch.testing.assert_close(found, expected(x, None), rtol=0, atol=0)
        attention.train()
        attention(x, None).square().sum().backward()
        optimizer.step()
