"""Train the shipped networks in plain PyTorch: one process, on one CUDA device or on the CPU, without Ray.

    python benchmarks/gpu_train.py --data photos.zip --pack PHOTOS --skip names.txt       photos into one file
    python benchmarks/gpu_train.py --data photos.zip --out run --minutes 9 --decay 2 --val set5=LQ:GT
    python benchmarks/gpu_train.py --data photos.zip --out run --quick                    a few small steps
    python benchmarks/gpu_train.py --data photos.zip --out detail --prior run/model.safetensors \\
        --lpips-trunk squeezenet1_1.pth --efficientnet efficientnet-lite0.pth --minutes 9

The second command starts a run of the regression network g or continues it, on any machine. With `--prior`,
which is g, the run is of the U-Net that starts from y0 = g(lq) and predicts the residual y0 - x0 in one step.
Its objective has LPIPS, the distance of features of EfficientNet-Lite0, and an adversary on them beside the
distance of g (`Stage`). `--out` holds

    state.safetensors    weights, their average, moments of the optimisers, position in the order of samples
    weights.safetensors  average and adversary in float16: a sixth of the size, and enough to continue from
                         the average
    model.safetensors    the average after the learning rate has decreased to zero: the model to use
    log.jsonl            loss, learning rate, steps per second; PSNR-Y of the average on each --val set

A run can always be continued, so its learning rate is constant. The last `--decay` minutes of a call are a
branch: the state is saved, the learning rate decreases linearly to zero, the model is saved, and the next
call continues from the state before the branch. Sample n of a run does not depend on the machine, the number
of workers or the number of calls. Its photo follows from a permutation for each pass over the data; crop and
degradation are those of `make_pair`; then it is rotated and flipped.

Requirements: torch, numpy, opencv, pillow, pydantic, einops, safetensors, and this repository on
PYTHONPATH. On a machine with many cores, set `--workers` to their number.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from resshift import seeds
from resshift.config import DataConfig, LossConfig, to_dict
from resshift.degradation import realesrgan_x4
from resshift.devices import on_device, use_one_thread
from resshift.images import ImageError
from resshift.metrics.lpips import Lpips
from resshift.metrics.psnr_ssim import luma, psnr
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig, RegressionConfig
from resshift.networks.conv_unet import ConvUNet
from resshift.networks.regression import RegressionNet
from resshift.pairs.jpeg import decode_photo
from resshift.pairs.training_pair import make_pair
from resshift.training.adversary import Adversary, adversary_optimizer
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.muon import Muon
from resshift.training.picture_loss import PictureLoss
from resshift.weights import load_into, read_tensors, save_safetensors, state_to_store

Image = NDArray[np.uint8]
Batch = tuple[Tensor, Tensor]

SCALE = 4
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
PACKED_SIDE, PACKED_QUALITY = 352, 88
WARMUP_STEPS = 200
MUON_FACTOR = 10.0  # learning rate of Muon / learning rate of AdamW
AVERAGE_RATE = 0.999
BRANCH_AVERAGE_RATE = 0.99  # older weights come from a higher learning rate
CLIP_NORM = 1.0
QUICK_STEPS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Part of a run.

    Args:
        steps: number of steps; None for the last stage, which has no end.
        batch: number of samples per step.
        crop_px: side of the clean crops. A photo is first shrunk by a random factor that leaves room for one.
        learning_rate: learning rate of AdamW, which trains the first and the last layer and the biases. The
            learning rate of Muon, which trains the rest, is `MUON_FACTOR` times as large.
        fourier: weight of the distance between spectra, added to the Charbonnier distance between pixels.
        lpips: weight of LPIPS.
        features: weight of the distance between features of EfficientNet-Lite0.
        lattice: weight of the measure of lattices (`resshift.training.lattice`), at crops of 64 px and more.
        artifacts: weight of the term against artifacts of the adversary.
        adversary: gradient of the adversary's term at the output picture / that of all other terms, by norms.
        bicubic: share of samples with bicubic degradation.
        mild: share of samples with mild degradation.
        camera: share of samples with the blur of a camera. The others have heavy degradation.
        noise3: share of all samples with noise that nothing shrinks (`resshift.degradation.recipe`).
    """

    steps: int | None = None
    batch: int
    crop_px: int
    learning_rate: float
    fourier: float = 0.1
    lpips: float = 0.0
    features: float = 0.0
    lattice: float = 0.0
    artifacts: float = 0.0
    adversary: float = 0.0
    bicubic: float = 0.5
    mild: float = 0.25
    camera: float = 0.0
    noise3: float = 0.2

    @property
    def loss(self) -> LossConfig:
        """Weights of the terms."""
        return LossConfig(
            mse=0.0,
            charbonnier=1.0,
            fourier=self.fourier,
            lpips=self.lpips,
            features=self.features,
            lattice=self.lattice,
            artifacts=self.artifacts,
            adversary=self.adversary,
        )


# At first, many steps matter more than large ones, so a CPU starts with small crops.
PLANS: dict[str, tuple[Stage, ...]] = {
    "cpu": (
        Stage(steps=10_400, batch=8, crop_px=128, learning_rate=1e-3),
        Stage(batch=8, crop_px=192, learning_rate=5e-4, bicubic=0.7, mild=0.15),
    ),
    "cuda": (
        Stage(steps=2_000, batch=32, crop_px=192, learning_rate=1e-3),
        Stage(batch=64, crop_px=256, learning_rate=7e-4),
    ),
    "detail": (
        Stage(
            steps=2_000,
            batch=8,
            crop_px=128,
            learning_rate=1e-3,
            lpips=0.2,
            features=0.1,
            bicubic=0.2,
            mild=0.2,
            camera=0.3,
        ),
        Stage(
            batch=8,
            crop_px=128,
            learning_rate=3e-4,
            lpips=0.15,
            features=0.1,
            lattice=0.06,
            artifacts=8.0,
            adversary=2.0,
            bicubic=0.2,
            mild=0.2,
            camera=0.3,
        ),
    ),
    "quick-detail": (
        Stage(steps=2, batch=2, crop_px=32, learning_rate=1e-3, lpips=0.2, features=0.1),
        Stage(batch=2, crop_px=64, learning_rate=5e-4, lpips=0.2, features=0.1, adversary=0.5),
    ),
    "quick": (
        Stage(steps=2, batch=2, crop_px=32, learning_rate=1e-3),
        Stage(batch=2, crop_px=64, learning_rate=5e-4),
    ),
}


def stage_at(plan: Sequence[Stage], step: int) -> tuple[Stage, int | None]:
    """Return the stage that a step belongs to, and the step at which the stage ends; None if it does not."""
    end = 0
    for stage in plan:
        if stage.steps is None:
            return stage, None
        end += stage.steps
        if step < end:
            return stage, end
    raise ValueError("the last stage of a plan must have no end")


def pack(folders: Sequence[Path], file: Path, megabytes: float, skip: frozenset[str]) -> int:
    """Write photos into one ZIP file without compression; return their number.

    If all photos fit, they are stored unchanged. Otherwise the centre of each, at most `PACKED_SIDE` pixels
    wide and high, is stored as JPEG of quality `PACKED_QUALITY`, in random order, until the file is full.

    Args:
        folders: folders that are searched for photos, with their subfolders.
        file: file to write.
        megabytes: largest size of all photos together, in units of 10^6 bytes.
        skip: names of photos that are left out.
    """
    paths = sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and path.name not in skip
    )
    budget = int(megabytes * 1e6)
    unchanged = sum(path.stat().st_size for path in paths) <= budget
    count = 0
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
        for i_path in seeds.philox("pack").permutation(len(paths)):
            path = paths[i_path]
            data, name = path.read_bytes(), f"{path.parent.name}/{path.name}"
            if not unchanged:
                data, name = _centre(data), f"{path.parent.name}/{path.stem}.jpg"
                budget -= len(data)
                if budget < 0:
                    break
            packed.writestr(name, data)
            count += 1
    return count


def _centre(data: bytes) -> bytes:
    rgb_u8 = decode_photo(data)
    height, width = (min(side, PACKED_SIDE) for side in rgb_u8.shape[:2])
    top, left = (rgb_u8.shape[0] - height) // 2, (rgb_u8.shape[1] - width) // 2
    bgr_u8 = cv2.cvtColor(rgb_u8[top : top + height, left : left + width], cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr_u8, [cv2.IMWRITE_JPEG_QUALITY, PACKED_QUALITY])[1].tobytes()


class Pairs(Dataset[Batch]):
    """Samples by their number in the run: hq (3, H, W) and lq (3, H / 4, W / 4), uint8."""

    def __init__(self, file: Path, stage: Stage, seed: int) -> None:
        self.file = file
        self.seed = seed
        self.crop = DataConfig(crop="scaled", crop_px=stage.crop_px)
        self.recipe = replace(
            realesrgan_x4(),
            bicubic_share=stage.bicubic,
            mild_share=stage.mild,
            camera_share=stage.camera,
            noise3_prob=stage.noise3,
        )
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    @cached_property
    def photos(self) -> list[tuple[str, bytes]]:
        """Names and contents of the photos. Each worker reads them itself."""
        with zipfile.ZipFile(self.file) as packed:
            return [(name, packed.read(name)) for name in sorted(packed.namelist())]

    def __getitem__(self, index: int) -> Batch:
        """Return sample number `index`. A photo that cannot be decoded is replaced by the next one."""
        epoch, i_photo = divmod(index, len(self.photos))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = seeds.philox(self.seed, "order", epoch).permutation(len(self.photos))
        key, data = self.photos[self.order[i_photo]]
        try:
            pair = make_pair(data, key, epoch, self.seed, self.crop, self.recipe)
        except ImageError:
            return self[index + 1]
        quarter_turns, mirrored = seeds.philox(self.seed, "turn", index).integers((4, 2))
        return _turned(pair.hq_u8, quarter_turns, mirrored), _turned(pair.lq_u8, quarter_turns, mirrored)


def _turned(image: Image, quarter_turns: int, mirrored: int) -> Tensor:
    turned = np.rot90(image, quarter_turns)
    turned = turned[:, ::-1] if mirrored else turned
    return torch.from_numpy(np.ascontiguousarray(turned.transpose(2, 0, 1)))


def _start_worker(_: int) -> None:
    use_one_thread()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers


def numbers(first: int, batch: int) -> Iterator[list[int]]:
    """Yield the sample numbers of each batch, beginning with sample `first`."""
    while True:
        yield list(range(first, first + batch))
        first += batch


def batches(file: Path, stage: Stage, seed: int, first: int, workers: int) -> Iterator[Batch]:
    """Yield batches of (hq, lq), uint8, beginning with sample number `first`."""
    loader = DataLoader(
        Pairs(file, stage, seed),
        batch_sampler=numbers(first, stage.batch),  # type: ignore[arg-type]  # any iterable of lists is allowed
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_start_worker,
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


class Regression:
    """g: low-quality picture -> estimate of the high-quality picture, judged pixel by pixel."""

    def __init__(self, config: RegressionConfig, device: torch.device) -> None:
        self.network: nn.Module = on_device(RegressionNet(config), device)
        self.adversaries = nn.ModuleList()
        self.norms = torch.zeros(2)
        self.metadata = {"regression": json.dumps(to_dict(config))}

    def estimate(self, network: nn.Module, lq: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, 4 h, 4 w), with a gradient for the network."""
        return network(lq)

    def backward(
        self, network: nn.Module, hq: Tensor, lq: Tensor, stage: Stage, step: int
    ) -> dict[str, Tensor]:
        """Add the gradient of the loss to the network, and return terms for the log."""
        del step
        estimate = self.estimate(network, lq)
        judged = PictureLoss()(estimate, hq, estimate, stage.loss)
        estimate.backward(judged.gradient.to(estimate.dtype))
        return {"loss": judged.terms["loss"]}


class Detail:
    """U-Net that starts from y0 = g(lq) and predicts the residual y0 - x0 in one step."""

    def __init__(self, device: torch.device, prior: Path, lpips_trunk: Path, efficientnet: Path) -> None:
        config = ConvUNetConfig(padding="replicate")
        self.network: nn.Module = on_device(ConvUNet(config), device)
        self.adversary = Adversary().to(device)
        self.adversaries = nn.ModuleList([self.adversary.heads])
        self.norms = self.adversary.norms
        self.metadata = {"conv_unet": json.dumps(to_dict(config)), "prior": prior.name}
        self.latent = PixelUnshuffle(SCALE)
        self.multiple = config.size_multiple
        g = RegressionNet(RegressionConfig())
        load_into(g, {key: value.float() for key, value in read_tensors(prior).items()})
        self.g = on_device(g.eval().requires_grad_(False), device)
        trunk = on_device(EfficientNetLite0.from_file(efficientnet), device)
        periods = (SCALE, SCALE * config.size_multiple)
        self.judge = PictureLoss(Lpips("squeeze", lpips_trunk).to(device), trunk, periods)
        self.optimiser = adversary_optimizer(self.adversary)

    def estimate(self, network: nn.Module, lq: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, 3, 4 h, 4 w), with a gradient for the network."""
        return self._estimates(network, lq)[1]

    def _estimates(self, network: nn.Module, lq: Tensor) -> tuple[Tensor, Tensor]:
        height, width = lq.shape[2:]
        padding = (0, -width % self.multiple, 0, -height % self.multiple)
        whole = F.pad(lq, padding, mode="reflect") if any(padding) else lq
        with torch.no_grad():
            start = self.g(whole)
        y0 = self.latent.encode(start)
        t = torch.zeros(len(lq), dtype=torch.int64, device=lq.device)
        x0 = self.latent.decode(y0 - network(y0, t, whole))
        return start, x0[..., : SCALE * height, : SCALE * width]

    def backward(
        self, network: nn.Module, hq: Tensor, lq: Tensor, stage: Stage, step: int
    ) -> dict[str, Tensor]:
        """Add the gradient of the loss to the network, take a step of the adversary, and return terms for the
        log.
        """
        start, estimate = self._estimates(network, lq)
        row, column = seeds.philox("corner", step).integers(0, 4, 2)
        adversary = self.adversary if stage.adversary else None
        if adversary is not None:
            adversary.renew()
        judged = self.judge(estimate, hq, start, stage.loss, (row, column), adversary)
        gradient = judged.gradient
        if adversary is not None and judged.pull is not None and judged.seen is not None:
            squares = torch.stack([gradient.square().sum(), judged.pull.square().sum()])
            gradient = gradient + stage.adversary * adversary.balance(squares) * judged.pull
            self.optimiser.zero_grad()
            judged.seen.backward()
            self.optimiser.step()
        estimate.backward(gradient.to(estimate.dtype))
        terms = judged.terms
        pixels = terms["charbonnier"] + (stage.fourier * terms["fourier"] if stage.fourier else 0.0)
        shown = ("lpips", "features", "lattice", "artifacts", "fooled", "seen")
        return {"loss": pixels} | {name: terms[name] for name in shown if name in terms}


class Trainer:
    """Network, its average, optimisers, and position of the run."""

    def __init__(self, model: Regression | Detail, device: torch.device, seed: int) -> None:
        self.device = device
        self.seed = seed
        self.model = model
        self.network = model.network
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        inner = [
            value
            for key, value in self.network.named_parameters()
            if value.ndim == 4 and not key.startswith(("stem", "head"))
        ]
        outer = [value for value in self.network.parameters() if all(value is not other for other in inner)]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            Muon(inner),
            torch.optim.AdamW(outer, betas=(0.9, 0.99), weight_decay=0.0, fused=True),
        )
        self.step = 0
        self.samples = 0
        self.updates = 0  # number of updates of the moments, for the warm-up

    def train(
        self, batch: Batch, learning_rate: float, stage: Stage, average_rate: float = AVERAGE_RATE
    ) -> dict[str, Tensor]:
        """Take a step and return terms of the loss, on the device. A gradient that is not finite is not
        applied.
        """
        hq, lq = (part.to(self.device, non_blocking=True).float().div_(127.5).sub_(1) for part in batch)
        self.network.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            lq = lq.contiguous(memory_format=torch.channels_last)
            terms = self.model.backward(self.network, hq, lq, stage, self.step)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), CLIP_NORM)
        if torch.isfinite(norm):
            warm = min(1.0, (self.updates + 1) / WARMUP_STEPS)
            for optimiser, factor in zip(self.optimisers, (MUON_FACTOR, 1.0), strict=True):
                optimiser.param_groups[0]["lr"] = factor * learning_rate * warm
                optimiser.step()
            rate = min(average_rate, (1 + self.step) / (10 + self.step))
            with torch.no_grad():
                for average, parameter in zip(
                    self.average.parameters(), self.network.parameters(), strict=True
                ):
                    average.lerp_(parameter, 1 - rate)
            self.updates += 1
        self.step += 1
        self.samples += len(hq)
        return terms

    @property
    def _trained(self) -> dict[str, nn.Module]:
        return {"network": self.network, "average": self.average, "adversaries": self.model.adversaries}

    @property
    def _all_optimisers(self) -> tuple[torch.optim.Optimizer, ...]:
        own = (self.model.optimiser,) if isinstance(self.model, Detail) else ()
        return *self.optimisers, *own

    def save(self, folder: Path) -> None:
        """Save the state, and the weights without the moments."""
        weights = {
            f"{part}.{key}": value
            for part, network in self._trained.items()
            for key, value in state_to_store(network).items()
        }
        moments = {
            f"moment.{i_optimiser}.{i}.{key}": value.cpu().contiguous()
            for i_optimiser, optimiser in enumerate(self._all_optimisers)
            for i, values in optimiser.state_dict()["state"].items()
            for key, value in values.items()
        }
        position = {
            "step": self.step,
            "samples": self.samples,
            "updates": self.updates,
            "seed": self.seed,
            "norms": self.model.norms.tolist(),
        }
        metadata = self.model.metadata | {"position": json.dumps(position)}
        save_safetensors(weights | moments, folder / "state.safetensors", metadata)
        small = {key: value.half() for key, value in weights.items() if not key.startswith("network.")}
        save_safetensors(small, folder / "weights.safetensors", metadata)

    def save_model(self, file: Path) -> None:
        """Save the average."""
        metadata = self.model.metadata | {"samples": str(self.samples)}
        save_safetensors(state_to_store(self.average), file, metadata)

    def load(self, folder: Path) -> bool:
        """Restore what `save` wrote; return False if there is nothing to restore."""
        found = [
            folder / name for name in ("state.safetensors", "weights.safetensors") if (folder / name).exists()
        ]
        if not found:
            return False
        with safe_open(found[0], "pt") as file:
            position: dict[str, Any] = json.loads(file.metadata()["position"])
            keys: list[str] = file.keys()
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in keys}
        for part, network in self._trained.items():
            own = _below(part, tensors)
            load_into(network, _below("average", tensors) if part == "network" and not own else own)
        moments = _below("moment", tensors)
        for i_optimiser, optimiser in enumerate(self._all_optimisers):
            _restore_moments(optimiser, _below(str(i_optimiser), moments))
        self.step, self.samples, self.seed = position["step"], position["samples"], position["seed"]
        self.updates = position["updates"] if moments else 0
        self.model.norms.copy_(torch.tensor(position.get("norms", (0.0, 0.0))))
        return True


def _below(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _restore_moments(optimiser: torch.optim.Optimizer, moments: dict[str, Tensor]) -> None:
    if not moments:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    # The fused optimiser pairs elements by their place in memory, so moments need the layout of parameters.
    for parameter, restored in optimiser.state.items():
        for name, value in restored.items():
            if value.ndim:
                restored[name] = torch.empty_like(parameter.detach()).copy_(value)


def read_rgb(file: Path) -> Image:
    """Decode a picture to (H, W, 3) uint8."""
    return decode_photo(file.read_bytes())


@torch.no_grad()
def psnr_of(
    network: Callable[[Tensor], Tensor], sets: Sequence[str], device: torch.device
) -> dict[str, dict[str, float]]:
    """Return the mean PSNR-Y by name of set, of whole pictures and without a border of 4 pixels.

    Args:
        network: function (1, 3, h, w) -> (1, 3, 4 h, 4 w).
        sets: test sets as NAME=LQ:GT, two folders with pictures of equal names.
        device: device of the network.
    """
    result: dict[str, dict[str, float]] = {}
    for text in sets:
        name, folders = text.split("=", 1)
        lq_folder, gt_folder = (Path(folder) for folder in folders.split(":"))
        truths = {path.stem: path for path in gt_folder.iterdir()}
        rows: list[tuple[float, float]] = []
        for path in sorted(lq_folder.iterdir()):
            gt = luma(read_rgb(truths[path.stem]))
            lq = torch.from_numpy(read_rgb(path)).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1
            levels = ((network(lq)[0] + 1) * 127.5).round().clamp(0, 255)
            output = luma(levels.permute(1, 2, 0).to(torch.uint8).cpu().numpy()[: gt.shape[0], : gt.shape[1]])
            rows.append((psnr(output, gt), psnr(output, gt, SCALE)))
        whole, inside = np.mean(rows, axis=0)
        result[name] = {"psnr_y": round(float(whole), 3), "psnr_y_inside": round(float(inside), 3)}
    return result


class Run:
    """One call of the script: training within its time, and the files in the folder."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        plan = "quick" if chosen.quick else chosen.plan or self.device.type
        if chosen.prior:
            plan = "quick-detail" if chosen.quick else chosen.plan or "detail"
        self.plan = PLANS[plan]
        if chosen.learning_rate is not None:
            self.plan = tuple(replace(stage, learning_rate=chosen.learning_rate) for stage in self.plan)
        self.folder: Path = chosen.out
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seeds.derive(chosen.seed, "network") % 2**63)
        model = (
            Detail(self.device, chosen.prior, chosen.lpips_trunk, chosen.efficientnet)
            if chosen.prior
            else Regression(RegressionConfig(), self.device)
        )
        self.trainer = Trainer(model, self.device, chosen.seed)
        self.clock = (lambda: float(self.trainer.step)) if chosen.quick else time.monotonic
        self.started = self.saved = self.logged = self.judged = time.monotonic()
        self.stopped = False
        self.recent: list[dict[str, Tensor]] = []

    def __call__(self) -> None:
        """Train with the constant learning rate, then along the branch."""
        resumed = self.trainer.load(self.folder)
        parameters = sum(parameter.numel() for parameter in self.trainer.network.parameters())
        event = "resumed" if resumed else "started"
        self.log({"event": event, "device": str(self.device), "parameters": parameters})
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        length, decay = 60 * self.chosen.minutes, 60 * self.chosen.decay
        if self.chosen.quick:
            length, decay = QUICK_STEPS, QUICK_STEPS / 2
        end = self.clock() + length
        self._train_until(end - decay, 0.0)
        self.trainer.save(self.folder)
        self.log({"event": "saved"} | self._judged())
        if decay and not self.stopped:
            self._train_until(end, decay)
            if not self.stopped:
                self.trainer.save_model(self.folder / "model.safetensors")
                self.log({"event": "decayed"} | self._judged())

    def log(self, values: dict[str, Any]) -> None:
        """Append a line to the log and print it."""
        position = {
            "step": self.trainer.step,
            "samples": self.trainer.samples,
            "seconds": round(time.monotonic() - self.started, 1),
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        line = json.dumps(position | values)
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def _judged(self) -> dict[str, Any]:
        trainer = self.trainer
        figures = psnr_of(
            lambda lq: trainer.model.estimate(trainer.average, lq), self.chosen.val, self.device
        )
        self.judged = time.monotonic()
        return {"figures": figures} if figures else {}

    def _train_until(self, end: float, decay: float) -> None:
        """Train until the clock shows `end`; the learning rate is zero there if `decay` is its distance."""
        while self.clock() < end and not self.stopped:
            stage, last_step = stage_at(self.plan, self.trainer.step)
            source = batches(
                self.chosen.data, stage, self.trainer.seed, self.trainer.samples, self.chosen.workers
            )
            for batch in source:
                left = end - self.clock()
                if left <= 0 or self.stopped or self.trainer.step == last_step:
                    break
                rate = stage.learning_rate * (left / decay if decay else 1.0)
                average_rate = BRANCH_AVERAGE_RATE if decay else AVERAGE_RATE
                self.recent.append(self.trainer.train(batch, rate, stage, average_rate))
                self._keep(rate, branch=decay > 0)

    def _keep(self, rate: float, branch: bool) -> None:
        """Log, judge and save if it is time."""
        now = time.monotonic()
        if now - self.logged < self.chosen.log_every:
            return
        values: dict[str, Any] = {
            name: round(float(torch.stack([terms[name] for terms in self.recent if name in terms]).mean()), 5)
            for name in self.recent[-1]
        } | {
            "rate": float(f"{rate:.3g}"),
            "steps_per_s": round(len(self.recent) / (now - self.logged), 2),
        }
        self.recent.clear()
        if now - self.judged >= self.chosen.val_every:
            values |= self._judged()
        if now - self.saved >= self.chosen.save_every and not branch:
            self.trainer.save(self.folder)
            self.saved = now
        self.log(values)
        self.logged = time.monotonic()


def main() -> int:
    """Pack photos, or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="file of packed photos")
    parser.add_argument(
        "--pack",
        type=Path,
        action="append",
        metavar="FOLDER",
        help="pack the photos of a folder into --data instead of training",
    )
    parser.add_argument("--megabytes", type=float, default=45.0, help="largest size that --pack writes")
    parser.add_argument(
        "--skip",
        type=Path,
        metavar="LIST",
        help="file with names of photos that --pack leaves out, one per line",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the run")
    parser.add_argument("--prior", type=Path, metavar="FILE", help="weights of g: train the U-Net after it")
    parser.add_argument("--lpips-trunk", type=Path, metavar="FILE", help="SqueezeNet 1.1 of torchvision")
    parser.add_argument(
        "--efficientnet", type=Path, metavar="FILE", help="EfficientNet-Lite0, see the module"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="duration of this call")
    parser.add_argument(
        "--decay", type=float, default=0.0, metavar="MINUTES", help="duration of the branch, within --minutes"
    )
    parser.add_argument("--plan", choices=PLANS, help="plan of stages; default: that of the device")
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"plan `quick` with {QUICK_STEPS} steps, half of them in the branch",
    )
    parser.add_argument("--learning-rate", type=float, help="learning rate instead of those of the plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--workers", type=int, default=1, help="number of processes that make pairs; 0: the main process"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of CPU threads of the main process")
    parser.add_argument("--val", action="append", default=[], metavar="NAME=LQ:GT")
    parser.add_argument("--log-every", type=float, default=30.0, metavar="SECONDS")
    parser.add_argument("--val-every", type=float, default=300.0, metavar="SECONDS")
    parser.add_argument("--save-every", type=float, default=300.0, metavar="SECONDS")
    chosen = parser.parse_args()
    if chosen.pack:
        skip = frozenset(chosen.skip.read_text().splitlines()) if chosen.skip else frozenset[str]()
        print(pack(chosen.pack, chosen.data, chosen.megabytes, skip), "photos")
        return 0
    if chosen.out is None:
        parser.error("--out is needed to train")
    if chosen.prior and not (chosen.lpips_trunk and chosen.efficientnet):
        parser.error("--prior needs --lpips-trunk and --efficientnet")
    torch.set_num_threads(chosen.threads)
    cv2.setNumThreads(0)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    Run(chosen)()
    return 0


if __name__ == "__main__":
    sys.exit(main())
