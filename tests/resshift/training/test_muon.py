"""Muon: singular values near one, and steps of the size that was asked for."""

from __future__ import annotations

import pytest
import torch

from resshift.training.muon import Muon, orthogonalised


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (6, 40), (40, 6)])
def test_singular_values_come_near_one_and_vectors_stay(rows: int, columns: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(1.0, 0.05, len(values))) @ vh
    result = u.T @ orthogonalised(matrix) @ vh.T
    torch.testing.assert_close(result, torch.diag(result.diagonal()), atol=1e-4, rtol=0)
    assert 0.65 < float(result.diagonal().min()) <= float(result.diagonal().max()) < 1.25


def test_a_step_of_a_convolution_has_the_size_of_the_rate() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 3, 3, 3))
    optimiser = Muon([weight], lr=0.1)
    weight.grad = 1e-6 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimiser.step()
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert 0.065 < float(values.min()) <= float(values.max()) < 0.125
    assert float((weight.detach() * weight.grad).sum()) < 0  # downhill


def test_weights_shrink_without_a_gradient() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = Muon([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros(2, 2)
    optimiser.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.95))


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    optimiser = Muon([weight], lr=0.1)
    weight.grad = torch.eye(2)
    optimiser.step()
    before = weight.detach().clone(), optimiser.state[weight]["mean"].clone()
    for value, moves in ((1.0, False), (0.0, True)):
        weight.grad = torch.full((2, 2), 1.0 if moves else float("nan"))
        optimiser.found_inf = torch.tensor([value])  # pyright: ignore[reportAttributeAccessIssue]  # as torch does
        optimiser.step()
        now = weight.detach(), optimiser.state[weight]["mean"]
        assert [torch.equal(a, b) for a, b in zip(now, before, strict=True)] == [not moves, not moves]
