"""Show where a model fails, on drawn pictures with content that super-resolution cannot recover; they are
free to redistribute.

    python benchmarks/failures.py --model tiny-x4 --out docs/failures.png

Rows: text of a few pixels, rings finer than the small picture can represent (a zone plate), a woven pattern,
and a drawn photo saved as JPEG of quality 10, below the qualities seen in training. Columns: nearest,
bicubic, the model, the ground truth. The figures of each row are printed. The font is Aileron (CC0), which is
included in Pillow; no photograph is used.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable

import cv2
import numpy as np
import record
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from synthetic_photos import synthetic_photo

from pipelines.evaluation.evaluate import bicubic_resized
from resshift.degradation import bicubic_x4, degrade, draw
from resshift.metrics.psnr_ssim import luma, psnr, ssim
from resshift.pairs.jpeg import decode_photo
from resshift.seeds import philox
from resshift.upscaler import Upscaler

SIDE_PX = 192
Picture = NDArray[np.uint8]


def text() -> Picture:
    """Return lines of text from 10 to 28 pixels high: 2.5 to 7 in the small picture."""
    image = Image.new("RGB", (SIDE_PX, SIDE_PX), (238, 234, 226))
    pen, top = ImageDraw.Draw(image), 6
    for size in (28, 22, 18, 14, 12, 10):
        pen.text(
            (8, top), "residual shifting 0123456789", font=ImageFont.load_default(size), fill=(30, 34, 60)
        )
        top += size + 12
    return np.asarray(image)


def zone_plate() -> Picture:
    """Return rings whose frequency grows to a quarter of a cycle per pixel at the edge; the small picture
    cannot represent frequencies above half of that.
    """
    axis = np.arange(SIDE_PX) - SIDE_PX / 2
    rings = np.cos(np.pi / (2 * SIDE_PX) * (axis[:, None] ** 2 + axis[None] ** 2))
    return np.repeat(np.rint(127.5 + 100 * rings).astype(np.uint8)[..., None], 3, axis=2)


def weave() -> Picture:
    """Return a weave of threads five pixels wide: a period of two and a half pixels in the small picture."""
    row, column = np.mgrid[:SIDE_PX, :SIDE_PX] // 5
    over = (row + column) % 2 == 0
    threads = np.where(over[..., None], (196, 170, 120), (94, 110, 150))
    return np.asarray(cv2.GaussianBlur(threads.astype(np.uint8), (0, 0), 0.7), dtype=np.uint8)


def photo() -> Picture:
    """Return a drawn photo."""
    return decode_photo(synthetic_photo(3), None)[:SIDE_PX, :SIDE_PX]


def shrunk(hq_u8: Picture) -> Picture:
    return degrade(hq_u8, draw(philox(0, "failures"), bicubic_x4()))


def shrunk_and_squeezed(hq_u8: Picture) -> Picture:
    file = io.BytesIO()
    Image.fromarray(shrunk(hq_u8)).save(file, "JPEG", quality=10)
    return decode_photo(file.getvalue(), None)


CASES: dict[str, tuple[Callable[[], Picture], Callable[[Picture], Picture]]] = {
    "text": (text, shrunk),
    "zone plate": (zone_plate, shrunk),
    "weave": (weave, shrunk),
    "JPEG of quality 10": (photo, shrunk_and_squeezed),
}


def main() -> int:
    """Write the picture and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-x4")
    parser.add_argument("--out", required=True, metavar="FILE.png")
    chosen = parser.parse_args()
    upscale = Upscaler.from_pretrained(chosen.model)
    rows, figures = [], []
    for name, (truth, degraded) in CASES.items():
        hq_u8 = truth()
        lq_u8 = degraded(hq_u8)
        bicubic, ours = bicubic_resized(lq_u8, 4), upscale(lq_u8, seed=0)
        rows.append(np.concatenate([lq_u8.repeat(4, 0).repeat(4, 1), bicubic, ours, hq_u8], axis=1))
        figures.append(
            [
                name,
                *(
                    round(measure(luma(result), luma(hq_u8)), 3)
                    for measure in (psnr, ssim)
                    for result in (bicubic, ours)
                ),
            ]
        )
    Image.fromarray(np.concatenate(rows)).save(chosen.out, optimize=True)
    print(record.table(["case", "bicubic PSNR-Y", "model PSNR-Y", "bicubic SSIM-Y", "model SSIM-Y"], figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
