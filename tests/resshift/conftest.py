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

from resshift.devices import use_one_thread
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import VectorQuantizer

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
    """Keep OpenCV and torch to one thread, as workers do: on a busy machine, the threads of a small operation
    wait for each other.
    """
    num_opencv, num_torch = cv2.getNumThreads(), torch.get_num_threads()
    use_one_thread()
    yield
    cv2.setNumThreads(num_opencv)
    torch.set_num_threads(num_torch)


@pytest.fixture
def recipe_weights() -> Callable[[nn.Module], nn.Module]:
    """Fill a network with the deterministic weights of the fixtures (tests/parity/README.md) and put it into
    evaluation mode.
    """

    def fill(network: nn.Module) -> nn.Module:
        state = network.state_dict()
        for key, tensor in state.items():
            if not tensor.is_floating_point() or key.endswith("attn_mask"):
                continue
            value = torch.randn(
                tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))
            )
            if tensor.ndim >= 2:
                value = value / (tensor.numel() / tensor.shape[0]) ** 0.5
            else:
                value = 1 + 0.1 * value if key.endswith("weight") else 0.1 * value
            tensor.copy_(value)
        return network.eval()

    return fill


@pytest.fixture
def settle_ties(monkeypatch: pytest.MonkeyPatch) -> Callable[[VectorQuantizer, np.ndarray], None]:
    """Let a quantiser choose the codes that the official run chose, once each is shown to be nearest within
    the tolerance of the latent.

    Which of two codes on a tie wins depends on the last bits, so on the kind of CPU; and the decoder's
    attention is global, so one other code moves every pixel a little.
    """

    def settle(quantizer: VectorQuantizer, official: np.ndarray, tolerance: float = 1e-3) -> None:
        own = quantizer.nearest
        chosen = torch.from_numpy(official).long()

        def nearest(z: torch.Tensor) -> torch.Tensor:
            indices, codes = own(z), quantizer.embedding.weight
            latents = z.movedim(1, -1).reshape(-1, z.shape[1])
            excess = (latents - codes[chosen]).norm(dim=1) - (latents - codes[indices.flatten()]).norm(dim=1)
            # A latent that is off by the tolerance on every axis is nearer to one code and farther from
            # another by its norm at most.
            assert excess.max() <= 2 * z.shape[1] ** 0.5 * tolerance
            assert (indices.flatten() != chosen).float().mean() < 0.01
            return chosen.reshape(indices.shape)

        monkeypatch.setattr(quantizer, "nearest", nearest)

    return settle


@pytest.fixture
def lpips(tmp_path: Path) -> Lpips:
    """Return LPIPS with a trunk of random weights, loaded by the same code as a trained one."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "trunk.pth")
    return Lpips("squeeze", tmp_path / "trunk.pth")
