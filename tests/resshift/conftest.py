"""Fixtures of the parity tests."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from resshift.pair import use_one_thread

PARITY = Path(__file__).parents[1] / "parity"


@pytest.fixture
def parity() -> Callable[[str], dict[str, np.ndarray]]:
    """Load the arrays of a parity fixture by name."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(PARITY / f"{name}.npz") as arrays:
            return dict(arrays)

    return load


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep OpenCV and torch to one thread, as workers do: on a busy machine, the threads of a small operation wait for each other."""
    num_opencv, num_torch = cv2.getNumThreads(), torch.get_num_threads()
    use_one_thread()
    yield
    cv2.setNumThreads(num_opencv)
    torch.set_num_threads(num_torch)


@pytest.fixture
def recipe_weights() -> Callable[[nn.Module], nn.Module]:
    """Fill a network with the deterministic weights of the fixtures (tests/parity/README.md) and put it into evaluation mode."""

    def fill(network: nn.Module) -> nn.Module:
        state = network.state_dict()
        for key, tensor in state.items():
            if not tensor.is_floating_point() or key.endswith("attn_mask"):
                continue
            value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            if tensor.ndim >= 2:
                value = value / (tensor.numel() / tensor.shape[0]) ** 0.5
            else:
                value = 1 + 0.1 * value if key.endswith("weight") else 0.1 * value
            tensor.copy_(value)
        return network.eval()

    return fill
