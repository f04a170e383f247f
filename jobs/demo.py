"""Upscale a few photos that come with scikit-image, and write a page that shows the results.

    python jobs/demo.py                    what `make demo` runs; writes demo/index.html

Each photo is downscaled by four with MATLAB's bicubic and upscaled again by `jobs/upscale.py` on a local Ray
cluster. The page shows the result beside bicubic upsampling and the original. It needs no network and no GPU.

Exit codes: 0 complete, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.command import Exit, parser, run

if TYPE_CHECKING:
    from pipelines.evaluation.figures import Image

# Photos without people, bundled with the package (public domain or CC0): no download.
PHOTOS = ("chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png")
SCALE = 4
METHODS = {"bicubic": "bicubic", "ours": "ours"}


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("--out", default="demo", help="folder for the page (default demo)")
    options.add_argument("--model", default="tiny-x4", help="model of scale 4 (default tiny-x4)")
    return options


def demo(options: argparse.Namespace) -> Exit:
    """Downscale, upscale with the bulk job, compare, write the page."""
    from pipelines.evaluation import evaluate, results
    from pipelines.evaluation.figures import against_truth
    from pipelines.evaluation.page import comparison_page
    from pipelines.ledger import ledger
    from resshift import images, storage
    from resshift.models import locate_model

    out = Path(options.out)
    lq_root, hq_root = out / "input", out / "upscaled"
    originals = {Path(name).stem: original(name) for name in PHOTOS}
    for name, photo in originals.items():
        shrunk = evaluate.bicubic_resized(photo, 1 / SCALE)
        storage.write_bytes(str(lq_root / f"{name}.png"), images.encode(images.Picture(pixels=shrunk)))

    job = Path(__file__).with_name("upscale.py")
    command = [sys.executable, str(job), str(lq_root), str(hq_root), "--model", options.model]
    print(f"$ python jobs/upscale.py {lq_root} {hq_root} --model {options.model}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code != Exit.COMPLETE:
        print(f"error: jobs/upscale.py ended with exit code {code}")
        return Exit.FAILED

    cards: list[results.Card] = []
    records: list[results.Record] = []
    for item in sorted(ledger.read(str(hq_root)).to_pylist(), key=lambda item: item["key"]):
        name = Path(item["key"]).stem
        lq = images.decode(storage.read_bytes(str(lq_root / item["key"]))).pixels
        ours = images.decode(storage.read_bytes(str(hq_root / item["output"]))).pixels
        bicubic = evaluate.bicubic_resized(lq, SCALE)
        record: results.Record = {
            "key": name,
            "status": "ok",
            "reason": "",
            "message": "",
            "seconds": item["seconds"],
            "bicubic": against_truth(bicubic, originals[name]),
            "ours": against_truth(ours, originals[name]),
        }
        pictures = {"lq": lq, "bicubic": bicubic, "ours": ours, "gt": originals[name]}
        records.append(record)
        encoded = {kind: images.encode(images.Picture(pixels=pixels)) for kind, pixels in pictures.items()}
        cards.append(results.card(record, encoded, METHODS, name=name.replace("_", " ")))

    model = locate_model(options.model)
    steps = model.config.steps
    page = comparison_page(
        title="Residual shifting, four times larger",
        lead=f"Photos that come with scikit-image, shrunk {SCALE}x and upscaled again by {model.name} in "
        f"{steps} step{'s' if steps > 1 else ''}, through Ray on this machine. Drag the divider: bicubic on "
        "the left, ours on the right.",
        cards=cards,
        summary=results.table(records, METHODS),
        facts={
            "model": f"{model.name} ({model.identity()})",
            "degradation": "MATLAB bicubic",
            "CPU cores": str(os.cpu_count()),
        },
    )
    target = (out / "index.html").resolve()
    storage.write_bytes(str(target), page.encode())
    print(f"\nopen {target}")
    return Exit.COMPLETE


def original(name: str) -> Image:
    """Return a bundled photo, cut to a multiple of the scale, (H, W, 3) uint8."""
    import skimage.data

    from resshift import images, storage

    path = Path(skimage.data.__file__).parent / name
    pixels = images.rgb_u8(images.decode(storage.read_bytes(str(path))))
    height, width = (length // SCALE * SCALE for length in pixels.shape[:2])
    return pixels[:height, :width].copy()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(demo, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
