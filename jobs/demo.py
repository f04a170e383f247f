"""Damage a few photos that come with scikit-image, upscale them, and write a page that shows the results.

    python jobs/demo.py                    what `make demo` runs; writes demo/index.html
    python jobs/demo.py --lpips-trunk squeezenet1_1.pth         with LPIPS beside PSNR
    python jobs/demo.py --model runs/mine/model                 with another model for all of them

Each photo is made four times smaller and worse by a degradation of the papers (`resshift.degradation`), and
upscaled by `jobs/upscale.py` on a local Ray cluster with the model that is meant for it. The page shows the
result beside bicubic upsampling and the original. It needs no network and no GPU.

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

# Photos without people, bundled with the package (public domain or CC0): no download. Each with what is done
# to it, and the model for that: the chain draws more detail, and more of the damage of what is very noisy.
PHOTOS = {
    "coffee.png": ("realesrgan-x4", "tiny-x4"),
    "rocket.jpg": ("realesrgan-x4", "tiny-x4"),
    "chelsea.png": ("imagenet-test-x4", "tiny-x4-s4"),
    "hubble_deep_field.jpg": ("bicubic-x4", "tiny-x4"),
}
DAMAGES = {
    "realesrgan-x4": "heavy: blur, noise and JPEG, twice",
    "imagenet-test-x4": "mild: blur, noise and JPEG",
    "bicubic-x4": "only shrunk",
}
LONGEST_PX = 512
SCALE = 4
METHODS = {"bicubic": "bicubic", "ours": "ours"}


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("--out", default="demo", help="folder for the page (default demo)")
    options.add_argument("--model", help="model of scale 4 for all of them (default: for each its own)")
    options.add_argument(
        "--lpips-trunk", metavar="FILE", help="weights of SqueezeNet 1.1 as torchvision has them, for LPIPS"
    )
    return options


def demo(options: argparse.Namespace) -> Exit:
    """Damage, upscale with the bulk job, compare, write the page."""
    from pipelines.evaluation import evaluate, results
    from pipelines.evaluation.figures import Judge
    from pipelines.evaluation.page import comparison_page
    from pipelines.ledger import ledger
    from resshift import images, storage
    from resshift.models import locate_model

    out, trunk = Path(options.out), options.lpips_trunk or cached_trunk()
    judge = Judge(lpips_net="squeeze" if trunk else None, lpips_trunk=trunk)
    models = {name: options.model or model for name, (_, model) in PHOTOS.items()}
    originals = {Path(name).stem: original(name) for name in PHOTOS}
    records: list[results.Record] = []
    cards: list[results.Card] = []
    for model in dict.fromkeys(models.values()):
        label = locate_model(model).name
        lq_root, hq_root = out / "input" / label, out / "upscaled" / label
        for name in (name for name in PHOTOS if models[name] == model):
            worse = damaged(originals[Path(name).stem], name)
            storage.write_bytes(
                str(lq_root / f"{Path(name).stem}.png"), images.encode(images.Picture(pixels=worse))
            )
        job = Path(__file__).with_name("upscale.py")
        command = [sys.executable, str(job), str(lq_root), str(hq_root), "--model", model]
        print(f"$ python jobs/upscale.py {lq_root} {hq_root} --model {model}", flush=True)
        code = subprocess.run(command, check=False).returncode
        if code != Exit.COMPLETE:
            print(f"error: jobs/upscale.py ended with exit code {code}")
            return Exit.FAILED
        for item in ledger.read(str(hq_root)).to_pylist():
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
                "bicubic": judge(bicubic, originals[name]),
                "ours": judge(ours, originals[name]),
            }
            pictures = {"lq": lq, "bicubic": bicubic, "ours": ours, "gt": originals[name]}
            encoded = {
                kind: images.encode(images.Picture(pixels=pixels)) for kind, pixels in pictures.items()
            }
            done = next(damage for file, (damage, _) in PHOTOS.items() if Path(file).stem == name)
            records.append(record)
            cards.append(
                results.card(record, encoded, METHODS, f"{DAMAGES[done]} · {label}", name.replace("_", " "))
            )
    order = [Path(name).stem.replace("_", " ") for name in PHOTOS]
    page = comparison_page(
        title="Residual shifting, four times larger",
        lead="Photos that come with scikit-image, damaged, made four times smaller, and upscaled through "
        "Ray on this machine. Drag the divider: bicubic on the left, ours on the right. With each photo the "
        "better of two figures is marked, whichever it is: PSNR rewards blur, and bicubic wins it on some "
        "damaged photos; "
        + (
            "LPIPS is nearer to what people see (this kind was part of the training)."
            if trunk
            else "LPIPS, nearer to what people see, needs --lpips-trunk."
        ),
        cards=sorted(cards, key=lambda card: order.index(card.name)),
        summary=results.table(records, METHODS),
        facts={
            "models": ", ".join(
                f"{one.name} ({one.identity()}), {one.config.steps} step{'s' * (one.config.steps > 1)}"
                for one in map(locate_model, dict.fromkeys(models.values()))
            ),
            "degradation": ", ".join(dict.fromkeys(damage for damage, _ in PHOTOS.values())),
            "CPU cores": str(os.cpu_count()),
        },
    )
    target = (out / "index.html").resolve()
    storage.write_bytes(str(target), page.encode())
    print(f"\nopen {target}")
    return Exit.COMPLETE


def cached_trunk() -> str | None:
    """Return the trunk of LPIPS if torchvision has it from before: the demo downloads nothing."""
    import torch

    path = Path(torch.hub.get_dir()) / "checkpoints" / "squeezenet1_1-b8a52dc0.pth"
    return str(path) if path.is_file() else None


def original(name: str) -> Image:
    """Return the middle of a bundled photo, cut to a multiple of the scale, (H, W, 3) uint8."""
    import skimage.data

    from resshift import images, storage

    path = Path(skimage.data.__file__).parent / name
    pixels = images.rgb_u8(images.decode(storage.read_bytes(str(path))))
    height, width = (min(length, LONGEST_PX) // SCALE * SCALE for length in pixels.shape[:2])
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width].copy()


def damaged(photo: Image, name: str) -> Image:
    """Return what is made of a photo of `PHOTOS`, (H / 4, W / 4, 3) uint8; always the same."""
    from pipelines.evaluation.testset import RECIPES
    from resshift import seeds
    from resshift.degradation.apply import degrade
    from resshift.degradation.drawing import draw

    recipe = RECIPES[PHOTOS[name][0]]()
    return degrade(photo, draw(seeds.philox(0, "demo", name), recipe))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(demo, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
