"""The decoder computes activations again in the backward pass when it is told to, with the same gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from resshift.networks.autoencoder import VQAutoencoder
from resshift.networks.config import VQConfig


def test_checkpointed_decoder_keeps_less_and_has_the_same_gradient() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder = VQAutoencoder(VQConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, n_embed=16))
        latent = torch.randn(1, 3, 8, 8)
    autoencoder.requires_grad_(False)

    def gradient() -> tuple[Tensor, int]:
        z, kept = latent.clone().requires_grad_(True), [0]

        def pack(tensor: Tensor) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            picture = autoencoder.decode(z, quantize=False)
        picture.square().mean().backward()
        assert z.grad is not None
        return z.grad, kept[0]

    plain, many = gradient()
    autoencoder.checkpoint_decoder()
    again, few = gradient()
    assert torch.equal(plain, again)
    assert few < many / 2
