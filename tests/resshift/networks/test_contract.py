"""Import paths and calls that others rely on: networks by their configurations, weights read and loaded."""

from __future__ import annotations

from pathlib import Path

import torch

from resshift.networks.autoencoder import VQAutoencoder, VQConfig
from resshift.networks.unet import UNetConfig, UNetSwin
from resshift.weights import load_into, read_state_dict


def test_a_unet_is_built_from_a_configuration_beside_it_and_its_saved_weights_load(tmp_path: Path) -> None:
    config = UNetConfig(
        image_size=16, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, swin_embed_dim=32, lq_size=16
    )
    network, other = UNetSwin(config), UNetSwin(config)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "unet.pth")
    state = read_state_dict(tmp_path / "unet.pth")
    load_into(other, state)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in state.items())
    x, t = torch.zeros(2, 3, 16, 16), torch.tensor([0, 3])
    assert other(x, t, x, mask=None).shape == x.shape


def test_a_vq_autoencoder_is_built_from_a_configuration_beside_it_and_decodes_what_it_quantises() -> None:
    config = VQConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, embed_dim=3, n_embed=16)
    autoencoder = VQAutoencoder(config)
    with torch.no_grad():
        z = autoencoder.encode(torch.zeros(1, 3, 16, 16))
        quantised, indices = autoencoder.quantize(z)
        assert z.shape == quantised.shape == (1, 3, 8, 8)
        assert indices.max() < config.n_embed
        torch.testing.assert_close(autoencoder.decode(z), autoencoder.decode(quantised, quantize=False))
