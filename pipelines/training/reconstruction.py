"""Is the first stage the bottleneck? Pictures through an autoencoder and back, with nothing in between.

Each picture's centre is encoded, quantised and decoded as at the end of the chain. PSNR and SSIM of luma,
LPIPS where its trunk is given, and how many codes are in use; the same without quantisation tells the
codebook's part of the loss from the decoder's.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from pipelines.evaluation.figures import Image, Judge
from resshift import images, storage, weights
from resshift.config import ConfigError
from resshift.images import ImageError, Picture
from resshift.networks.autoencoder import VQAutoencoder
from resshift.storage import StorageError
from resshift.training.autoencoder import AutoencoderRunConfig

_LIMIT = 64  # pictures


def centre(rgb: Image, side: int, factor: int) -> Image:
    """Cut the centre: at most `side` pixels a side, and multiples of the factor."""
    height, width = (min(side, length) // factor * factor for length in rgb.shape[:2])
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return rgb[top : top + height, left : left + width]


@torch.inference_mode()
def reconstruct(autoencoder: VQAutoencoder, rgb: Image) -> tuple[Image, Image, set[int]]:
    """Return the picture after quantisation and decoding, after decoding alone, and the codes it used."""
    device = next(autoencoder.parameters()).device
    z = autoencoder.encode(images.to_tensor(rgb).to(device))
    z_q, indices = autoencoder.quantize(z)
    pictures = [images.from_tensor(autoencoder.decode(latent, quantize=False).float()) for latent in (z_q, z)]
    return pictures[0], pictures[1], set(indices.unique().tolist())


def report(photos: str, config: AutoencoderRunConfig, init: str, out: str) -> tuple[list[list[str]], int]:
    """Measure an autoencoder on a folder or bucket, write OUT/report.json and OUT/pictures.png, and return a
    table and how many failed.

    Raises:
        ConfigError: No picture can be used.
        WeightsError: The weights do not fit.
    """
    autoencoder = VQAutoencoder(config.first_stage.vq).eval().requires_grad_(False)
    weights.load_into(autoencoder, weights.read_state_dict(init))
    autoencoder.to("cuda" if torch.cuda.is_available() else "cpu")
    judge = Judge(
        lpips_net=config.loss.lpips_net if config.loss.lpips_trunk else None,
        lpips_trunk=config.loss.lpips_trunk,
    )
    rows: list[dict[str, Any]] = []
    shown: list[Image] = []
    codes: set[int] = set()
    for entry in storage.list_entries(photos):
        if len(rows) == _LIMIT:
            break
        row: dict[str, Any] = {"key": entry.key, "status": "ok"}
        try:
            picture = images.rgb_u8(images.decode(storage.read_bytes(entry.uri)))
        except (ImageError, StorageError) as error:
            rows.append(row | {"status": "failed", "reason": str(error.reason), "message": str(error)})
            continue
        rgb = centre(picture, config.data.crop_px, autoencoder.factor)
        if min(rgb.shape[:2]) < 16:
            rows.append(
                row
                | {
                    "status": "failed",
                    "reason": "too_small",
                    "message": f"{picture.shape[1]}x{picture.shape[0]}",
                }
            )
            continue
        quantised, continuous, used = reconstruct(autoencoder, rgb)
        codes |= used
        rows.append(row | {"quantised": judge(quantised, rgb), "continuous": judge(continuous, rgb)})
        if len(shown) < 8 and rgb.shape[:2] == (config.data.crop_px, config.data.crop_px):
            shown.append(np.concatenate([rgb, quantised], axis=1))
    good = [row for row in rows if row["status"] == "ok"]
    if not good:
        raise ConfigError(f"no picture of {photos} can be decoded")
    means = {
        kind: {name: float(np.mean([min(row[kind][name], 100.0) for row in good])) for name in good[0][kind]}
        for kind in ("quantised", "continuous")
    }
    summary = {"preset": config.preset, "weights": init, "pictures": len(good), "means": means}
    summary |= {"codes_used": len(codes), "codes": config.first_stage.vq.n_embed, "rows": rows}
    storage.write_bytes(storage.join(out, "report.json"), (json.dumps(summary, indent=2) + "\n").encode())
    if shown:
        storage.write_bytes(
            storage.join(out, "pictures.png"), images.encode(Picture(pixels=np.concatenate(shown, axis=0)))
        )
    table = [["", *means["quantised"]]] + [
        [kind, *(f"{value:.4f}" for value in figures.values())] for kind, figures in means.items()
    ]
    return [*table, ["codes used", f"{len(codes)}/{config.first_stage.vq.n_embed}"]], len(rows) - len(good)
