"""Compare the library's PNG encoding with that of OpenCV, each at its default settings.

python benchmarks/png.py [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys

import cv2
import numpy as np
from timing import fastest

from resshift.images import Picture, encode


def main() -> int:
    """Time both in turn."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    side, repeats = (512, 5) if chosen.quick else (2048, 15)
    rng = np.random.default_rng(0)
    smooth = cv2.resize(
        rng.integers(0, 256, (side // 16, side // 16, 3)).astype(np.float32),
        (side, side),
        interpolation=cv2.INTER_CUBIC,
    )
    photo = (smooth + rng.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
    alpha = photo[..., 0].copy()
    pictures = {
        "grey": Picture(pixels=photo[..., :1].copy()),
        "rgb": Picture(pixels=photo),
        "rgba": Picture(pixels=photo, alpha=alpha),
        "rgb 16 bit": Picture(pixels=photo.astype(np.uint16) * 257),
    }
    result: dict[str, float] = {}
    print(f"{'':12} {'ours ms':>9} {'OpenCV ms':>10} {'ratio':>6} {'ours MB':>8} {'OpenCV MB':>10}")
    for name, picture in pictures.items():
        plain = picture.pixels if picture.alpha is None else np.dstack([picture.pixels, picture.alpha])
        works = [lambda picture=picture: encode(picture), lambda plain=plain: cv2.imencode(".png", plain)]
        ours, theirs = fastest(works, repeats)
        sizes = len(encode(picture)) / 1e6, cv2.imencode(".png", plain)[1].nbytes / 1e6
        result[name] = round(ours / theirs, 3)
        print(
            f"{name:12} {1e3 * ours:9.1f} {1e3 * theirs:10.1f} {ours / theirs:6.2f} {sizes[0]:8.2f} "
            f"{sizes[1]:10.2f}"
        )
    print(json.dumps({"ratio_to_opencv": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
