"""Draw pages of text, signs, comics and charts as training pictures: letters and lines are what people notice
first, and photographs hold few of them.

    python benchmarks/drawings.py FOLDER --num 200
    python benchmarks/gpu_train.py --data photos.zip --pack PHOTOS --pack FOLDER

Picture n follows from (seed, n). It is drawn four times as large and averaged, so its edges are those of a
camera. Fonts are Aileron (CC0), which is included in Pillow, and those of OpenCV.
"""

from __future__ import annotations

import argparse
import string
import sys
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from resshift.seeds import philox

SIDE_PX, OVERSAMPLING = 384, 4
Colour = tuple[int, int, int]
HERSHEY = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)


def readable_on(colour: Colour) -> Colour:
    """Return nearly black or nearly white, whichever differs from a colour."""
    return (15, 15, 15) if sum(colour) > 380 else (245, 245, 245)


class Drawing:
    """A canvas of `SIDE_PX` times `OVERSAMPLING` pixels, and the random numbers of one picture."""

    def __init__(self, seed: int, number: int) -> None:
        self.rng = philox("drawing", seed, number)
        self.side = SIDE_PX * OVERSAMPLING
        paper, ink = (246, 243, 235) if self.rng.random() < 0.4 else self.colour(), self.colour()
        self.paper, self.ink = paper, ink if abs(sum(paper) - sum(ink)) > 250 else readable_on(paper)
        self.image = Image.new("RGB", (self.side, self.side), paper)
        self.pen = ImageDraw.Draw(self.image)

    def colour(self) -> Colour:
        """Return a random colour."""
        red, green, blue = (int(value) for value in self.rng.integers(0, 256, 3))
        return red, green, blue

    def word(self) -> str:
        """Return a random word."""
        letters = (
            string.ascii_lowercase if self.rng.random() < 0.7 else string.ascii_uppercase + string.digits
        )
        text = "".join(self.rng.choice(list(letters), self.rng.integers(2, 10)))
        return text.capitalize() if self.rng.random() < 0.3 else text

    def draw_page(self) -> None:
        """Draw lines of text that get smaller or stay equal, in one of two fonts."""
        top, size = 0.02 * self.side, float(self.rng.uniform(8, 40)) * OVERSAMPLING
        shrinks = self.rng.random() < 0.5
        while top < self.side:
            line = " ".join(self.word() for _ in range(int(self.side / size) + 2))
            self.draw_text(line, 0.03 * self.side, top, size)
            top += 1.4 * size
            size = max(7.0 * OVERSAMPLING, size * (0.88 if shrinks else 1.0))

    def draw_text(
        self, text: str, left: float, top: float, size: float, colour: Colour | None = None
    ) -> None:
        """Draw text whose letters are about `size` pixels high."""
        if self.rng.random() < 0.6:
            font = ImageFont.load_default(size)
            self.pen.text((left, top), text, font=font, fill=colour or self.ink)
            return
        canvas = np.array(self.image)
        place = (int(left), int(top + 0.8 * size))
        face = HERSHEY[self.rng.integers(len(HERSHEY))]
        thickness = max(2, int(size * self.rng.uniform(0.04, 0.12)))
        cv2.putText(canvas, text, place, face, size / 32, colour or self.ink, thickness, cv2.LINE_AA)
        self.image = Image.fromarray(canvas)
        self.pen = ImageDraw.Draw(self.image)

    def draw_sign(self) -> None:
        """Draw boxes with a word in each, on a gradient, turned a little."""
        down = np.linspace(0.5, 1.2, self.side)[:, None, None]
        paper = np.broadcast_to(np.array(self.paper), (self.side, self.side, 3))
        self.image = Image.fromarray((paper * down).clip(0, 255).astype(np.uint8))
        self.pen = ImageDraw.Draw(self.image)
        for _ in range(self.rng.integers(3, 8)):
            left, top = self.rng.uniform(-0.1, 0.8, 2) * self.side
            size = float(self.rng.uniform(12, 60)) * OVERSAMPLING
            board, text = self.colour(), self.word()
            box = (left, top, left + 0.75 * size * len(text), top + 1.5 * size)
            border = int(self.rng.integers(0, 4)) * OVERSAMPLING
            self.pen.rounded_rectangle(box, radius=0.2 * size, fill=board, outline=self.ink, width=border)
            self.draw_text(text, left + 0.2 * size, top + 0.1 * size, size, readable_on(board))
        self.image = self.image.rotate(
            float(self.rng.uniform(-12, 12)), Image.Resampling.BICUBIC, fillcolor=self.paper
        )

    def draw_comic(self) -> None:
        """Draw closed curves with flat colours and dark outlines, then strokes."""
        canvas = np.array(self.image)
        for _ in range(self.rng.integers(5, 14)):
            centre = self.rng.uniform(0, self.side, 2)
            angles = np.linspace(0, 2 * np.pi, 200)
            radius = self.rng.uniform(0.05, 0.35) * self.side * np.ones_like(angles)
            for wave in range(2, 6):
                swing = self.rng.uniform(0, 0.25)
                radius *= 1 + swing * np.sin(wave * angles + self.rng.uniform(0, 2 * np.pi))
            points = centre + np.stack((np.cos(angles), np.sin(angles)), 1) * radius[:, None]
            curve = [np.rint(points).astype(np.int32)]
            cv2.fillPoly(canvas, curve, self.colour(), cv2.LINE_AA)
            width = int(self.rng.integers(1, 5)) * OVERSAMPLING
            cv2.polylines(canvas, curve, True, self.ink, width, cv2.LINE_AA)
        for _ in range(self.rng.integers(10, 40)):
            points = np.cumsum(self.rng.normal(0, 0.03, (12, 2)), 0) + self.rng.uniform(0, 1, 2)
            curve = [np.rint(points * self.side).astype(np.int32)]
            width = int(self.rng.integers(1, 4)) * OVERSAMPLING
            cv2.polylines(canvas, curve, False, self.ink, width, cv2.LINE_AA)
        self.image = Image.fromarray(canvas)
        self.pen = ImageDraw.Draw(self.image)

    def draw_chart(self) -> None:
        """Draw a grid, bars, lines and their labels, as a screen shows them."""
        step = int(self.rng.integers(16, 60)) * OVERSAMPLING
        for place in range(0, self.side, step):
            self.pen.line((0, place, self.side, place), fill=self.ink, width=OVERSAMPLING)
            self.pen.line((place, 0, place, self.side), fill=self.ink, width=OVERSAMPLING)
            top = self.side - int(self.rng.uniform(0.1, 0.9) * self.side)
            if self.rng.random() < 0.6:
                self.pen.rectangle((place + step // 4, top, place + step // 2, self.side), fill=self.colour())
            size = float(self.rng.uniform(9, 18)) * OVERSAMPLING
            self.draw_text(self.word(), place, float(self.rng.uniform(0, self.side)), size)
        for _ in range(self.rng.integers(1, 4)):
            heights = np.cumsum(self.rng.normal(0, 0.06, 40)) * self.side + self.rng.uniform(0, self.side)
            points = np.stack((np.linspace(0, self.side, 40), heights), 1)
            self.pen.line(
                [(float(x), float(y)) for x, y in points], fill=self.colour(), width=2 * OVERSAMPLING
            )

    def finished(self) -> NDArray[np.uint8]:
        """Return the picture, (SIDE_PX, SIDE_PX, 3)."""
        size = (SIDE_PX, SIDE_PX)
        return np.asarray(cv2.resize(np.asarray(self.image), size, interpolation=cv2.INTER_AREA), np.uint8)


def drawing(seed: int, number: int) -> NDArray[np.uint8]:
    """Return picture `number` of a seed, (SIDE_PX, SIDE_PX, 3) uint8: page, sign, comic and chart in turn."""
    canvas = Drawing(seed, number)
    (canvas.draw_page, canvas.draw_sign, canvas.draw_comic, canvas.draw_chart)[number % 4]()
    return canvas.finished()


def main() -> int:
    """Write the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--num", type=int, default=200, help="number of pictures (default 200)")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for number in range(chosen.num):
        Image.fromarray(drawing(chosen.seed, number)).save(chosen.folder / f"drawing-{number:05d}.png")
    print(chosen.num, "pictures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
