"""The picture of the README: two damaged photos as they are, by bicubic interpolation, and by the models.

    python benchmarks/before_after.py docs/before-after.jpg

Photos, damage and models are those of `jobs/demo.py` (CC0, bundled with scikit-image).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jobs import demo
from pipelines.evaluation import evaluate
from resshift import Upscaler

# Top left corner of the cut, in pixels of the original.
SHOWN = {"coffee.png": (100, 60), "chelsea.png": (40, 0)}
SIZE, BAR = (400, 300), 30


def rows() -> list[Image.Image]:
    """Return a row for each photo: input, bicubic, ours, each with a caption."""
    made: list[Image.Image] = []
    for name, (left, top) in SHOWN.items():
        damage, model = demo.PHOTOS[name]
        lq = demo.damaged(demo.original(name), name)
        pictures = {
            f"input, {demo.DAMAGES[damage]}": lq.repeat(demo.SCALE, 0).repeat(demo.SCALE, 1),
            "bicubic": evaluate.bicubic_resized(lq, demo.SCALE),
            model: Upscaler.from_pretrained(model)(lq),
        }
        row = Image.new("RGB", (len(pictures) * SIZE[0], SIZE[1] + BAR), "white")
        for i, (caption, pixels) in enumerate(pictures.items()):
            cut = np.ascontiguousarray(pixels[top : top + SIZE[1], left : left + SIZE[0]])
            row.paste(Image.fromarray(cut), (i * SIZE[0], 0))
            font = ImageFont.load_default(18)
            ImageDraw.Draw(row).text((i * SIZE[0] + 6, SIZE[1] + 5), caption, "black", font)
        made.append(row)
    return made


def main() -> None:
    """Write the picture."""
    made = rows()
    page = Image.new("RGB", (made[0].width, sum(row.height for row in made)))
    for i, row in enumerate(made):
        page.paste(row, (0, i * row.height))
    page.save(Path(sys.argv[1]), quality=85, optimize=True)


if __name__ == "__main__":
    main()
