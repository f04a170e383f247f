"""Compare the networks on a device with arrays computed with the official classes (tests/parity), for each
precision.

Only float32 with TF32 off is judged; TF32 and bf16 are reported. Weights and inputs follow the recipe of the
stored arrays.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor, nn

from resshift.networks.autoencoder import VQAutoencoder
from resshift.networks.config import UNetConfig, VQConfig
from resshift.networks.swin import BasicLayer
from resshift.networks.unet import UNetSwin
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.schedule import ShiftSchedule

# Largest absolute error allowed in float32 with TF32 off; the outputs have magnitudes of 2 to 8. Other
# kernels add in another order, which costs 2e-6 to 6e-6 on a CPU: 1e-4 leaves room for Winograd and split
# sums on a GPU, and still fails when TF32 (about 1e-3) is used by mistake. End to end, four steps multiply
# the error; the stored picture is float16. Codes whose distances differ by less than rounding may go either
# way.
TOLERANCE = {"unet": 1e-4, "swin": 1e-4, "vq": 1e-4, "e2e latent": 1e-3, "e2e picture": 2e-3}
LEAST_EQUAL_CODES = 0.998

SMALL_UNET, SMALL_VQ = UNetConfig(model_channels=32, swin_embed_dim=64), VQConfig(ch=32, n_embed=256)
Compared = Iterator[
    tuple[str, str, Tensor, Tensor]
]  # output, key of its tolerance ("" for codes), ours, official


def set_precision(name: str) -> None:
    """Allow or forbid TF32 in matrix products and convolutions. bf16 is left to autocast; operations that
    autocast keeps in float32 are exact.
    """
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"


def in_precision(call: Callable[..., Tensor], name: str, device: torch.device) -> Callable[..., Tensor]:
    """Wrap a network so that it runs under autocast where `name` is bf16, and returns float32."""

    def run(*args: Tensor | None) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=name == "bf16"):
            return call(*args).float()

    return run


def randomise(network: nn.Module) -> nn.Module:
    """Fill a network with the deterministic random weights of the parity arrays and set evaluation mode."""
    for key, tensor in network.state_dict().items():
        if not tensor.is_floating_point() or key.endswith("attn_mask"):
            continue
        value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if tensor.ndim >= 2:
            value = value / (tensor.numel() / tensor.shape[0]) ** 0.5
        else:
            value = 1 + 0.1 * value if key.endswith("weight") else 0.1 * value
        tensor.copy_(value)
    return network.eval()


def arrays_of(fixture: str, device: torch.device) -> dict[str, Tensor]:
    with np.load(record.ROOT / "tests" / "parity" / f"{fixture}.npz") as arrays:
        return {key: torch.from_numpy(value).to(device) for key, value in arrays.items()}


def compare_unet(
    config: UNetConfig, arrays: dict[str, Tensor], precision: str, device: torch.device
) -> Compared:
    network = in_precision(randomise(UNetSwin(config)).to(device), precision, device)
    mask = arrays["mask"].float() if "mask" in arrays else None
    yield "out", "unet", network(arrays["x"], arrays["t"], arrays["lq"], mask), arrays["out"]


def compare_swin(arrays: dict[str, Tensor], precision: str, device: torch.device) -> Compared:
    for case in sorted(key.removesuffix("_x") for key in arrays if key.endswith("_x")):
        map_size = int(case.split("_")[1].removeprefix("img"))
        layer = randomise(
            BasicLayer(channels=64, embed_dim=64, num_heads=2, depth=2, window=8, map_size=map_size)
        ).to(device)
        yield case, "swin", in_precision(layer, precision, device)(arrays[f"{case}_x"]), arrays[f"{case}_out"]


def compare_vq(arrays: dict[str, Tensor], precision: str, device: torch.device) -> Compared:
    vq = VQAutoencoder(SMALL_VQ)
    randomise(vq).to(device)
    decode = in_precision(lambda z: vq.decode(z, quantize=False), precision, device)
    yield "z", "vq", in_precision(vq.encode, precision, device)(arrays["x"]), arrays["z"]
    yield "codes", "", vq.quantize.nearest(arrays["z"]).flatten(), arrays["idx"]
    yield "out", "vq", decode(arrays["zq"]), arrays["out"]
    yield "out_noquant", "vq", decode(arrays["z"]), arrays["out_noquant"]


def compare_end_to_end(arrays: dict[str, Tensor], precision: str, device: torch.device) -> Compared:
    """Compare bicubic, encode, prior, four steps and decode. The picture is decoded from the official codes,
    because a different code would change the whole picture slightly.
    """
    vq, lq = VQAutoencoder(SMALL_VQ), arrays["lq"]
    randomise(vq).to(device)
    unet = in_precision(randomise(UNetSwin(SMALL_UNET)).to(device), precision, device)
    schedule = ShiftSchedule.released(steps=4, kappa=2.0, min_noise=0.2)
    generator = torch.Generator().manual_seed(700)  # on the CPU, as the official run drew it
    y0 = in_precision(vq.encode, precision, device)(upsample(lq, 4))
    denoise = network_denoiser(unet, lq, y0, schedule)
    latent = sample(denoise, y0, schedule, lambda step: torch.randn(y0.shape, generator=generator).to(device))
    yield "latent", "e2e latent", latent, arrays["final_latent"]
    codes = arrays["idx"].long()
    yield "codes", "", vq.quantize.nearest(latent).flatten(), codes
    z_q = vq.quantize.embedding(codes.reshape(1, *latent.shape[2:])).movedim(-1, 1)
    decoded = in_precision(lambda z: vq.decode(z, quantize=False), precision, device)(z_q)
    yield "picture", "e2e picture", decoded.clamp(-1, 1), arrays["out"].float()


FIXTURES: dict[str, Callable[[dict[str, Tensor], str, torch.device], Compared]] = {
    "unet_base": partial(compare_unet, SMALL_UNET),
    "unet_fe128": partial(compare_unet, replace(SMALL_UNET, lq_size=128)),
    "unet_mask_lq64": partial(compare_unet, replace(SMALL_UNET, cond_mask=True)),
    "swin_basiclayer": compare_swin,
    "vq_f4_small": compare_vq,
    "e2e_x4_64": compare_end_to_end,
}


def _row(fixture: str, precision: str, compared: tuple[str, str, Tensor, Tensor]) -> dict[str, Any]:
    """Return the errors of one output. Only float32 is judged; NaN never passes."""
    output, kind, ours, official = compared
    row: dict[str, Any] = {"fixture": fixture, "output": output, "precision": precision}
    if kind:
        difference = ours - official
        tolerance, max_error = TOLERANCE[kind], float(difference.abs().max())
        row |= {
            "max_error": max_error,
            "relative_error": float(difference.norm() / official.norm()),
            "tolerance": tolerance,
        }
        passed = max_error <= tolerance
    else:
        share = float((ours == official).float().mean())
        row |= {"equal_share": share, "tolerance": LEAST_EQUAL_CODES}
        passed = share >= LEAST_EQUAL_CODES
    return row | {"passed": passed if precision == "fp32" else None}


@torch.no_grad()
def compare(device: torch.device, precisions: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run every fixture in every precision; yield one row per output."""
    for precision in precisions:
        set_precision(precision)
        for fixture, compare_fixture in FIXTURES.items():
            for compared in compare_fixture(arrays_of(fixture, device), precision, device):
                yield _row(fixture, precision, compared)
