"""Is a student better for its teacher? Students at test size, with one and without, for the same steps.

    python benchmarks/teachers.py            about four minutes of one core
    python benchmarks/teachers.py --quick    tenth of the steps: does it run

Pictures are drawn (`synthetic_photos`): crops of 32 px, whose finest grain degraded ones of 8 px do not have.
Those of the chain are crossed by a wave, light where it is dark in the next one with equal probability, which
is beyond what degraded ones can show. The mean of both has no wave: a network that is trained for the
distance of pixels draws a weak one at most, and a chain, step by step, one of them. Students of a chain of
four steps begin with its weights and learn for the same number of steps:

    alone     the loss of the chain, at its end only: no teacher
    sinsr     `resshift.training.distillation`
    rsd       `resshift.training.rsd`, without LPIPS, whose weights the repository does not have

and students of any model begin with nothing, on few pairs:

    truth     the truth as target: no teacher
    taught    what a larger network, which saw more pairs, made of them: `data.taught` = 1
    both      `data.taught` = 0.5

Figures on pictures that no one trained on, for one step:

    psnr      against the truth, dB, of all pixels of all pictures
    grain     mean |log2| of the ratio of powers of the result and of the truth over frequencies that the
              degraded picture does not have; 0 is as much detail as the truth has, 1 half or twice as much
    wave      mean contrast of the wave, as a share of that in the truth
    teacher   PSNR against what the teacher makes of the same picture with the same noise, in all its steps
              without noise between them

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import record
import torch
from synthetic_photos import synthetic_photo
from torch import Tensor, nn

from resshift import degradation, seeds
from resshift.config import DataConfig, LossConfig, OptimConfig, RunConfig, TrainConfig, with_settings
from resshift.images import Picture, encode
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig
from resshift.networks.conv_unet import ConvUNet, build_unet
from resshift.pairs.training_pair import StoredPair, TrainingPair, make_pair, stored_pair
from resshift.presets import preset
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.schedule import Sampler, ScheduleConfig, ShiftSchedule, Target
from resshift.training.distillation import Distillation, student_run, teacher_config
from resshift.training.losses import Objective
from resshift.training.rsd import RsdLearner
from resshift.training.step import DiffusionLearner, Learner, build_network, to_unit_range

CROP_PX, BATCH = 32, 16
_WAVE_LEVELS = 25  # of 255
# Three periods in eight pixels: shrunk to a quarter, nothing is left of it.
_WAVE = np.rint(_WAVE_LEVELS * np.cos(2 * np.pi * 3 / 8 * np.arange(CROP_PX)))[None, :, None]
Batch = dict[str, Tensor]


def run_of(channels: tuple[int, ...], steps: int, chain: int) -> RunConfig:
    """Return a run of a U-Net of convolutions.

    Args:
        channels: Channels of its levels.
        steps: Number of steps of the run.
        chain: Number of steps of the chain; 1 is a regression without noise.
    """
    base = preset("test-x4")
    unet = ConvUNetConfig(
        channels=channels, blocks_before=(1,) * len(channels), blocks_after=(1,), steps=chain
    )
    schedule = ScheduleConfig(steps=chain, kappa=1.0 if chain > 1 else 0.0)
    return replace(
        base,
        model=replace(base.model, unet=unet, schedule=schedule, target=Target.RESIDUAL),
        loss=LossConfig(),
        optim=OptimConfig(lr=1e-3, lr_end=1e-4, lr_schedule="cosine", warmup_steps=20),
        data=DataConfig(crop="random", crop_px=CROP_PX),
        train=TrainConfig(steps=steps, batch_size=BATCH, micro_batch=BATCH, ema_decay=0.98),
    )


def pairs(first: int, number: int, per_photo: int = 4) -> list[TrainingPair]:
    """Return pairs of drawn photos, the first of them number `first`."""
    crop, recipe = DataConfig(crop="random", crop_px=CROP_PX), degradation.bicubic_x4()
    photos = [synthetic_photo(first + i, 192, 256) for i in range(-(-number // per_photo))]
    made = [
        make_pair(photo, str(first + i), epoch, 0, crop, recipe)
        for i, photo in enumerate(photos)
        for epoch in range(per_photo)
    ]
    return made[:number]


def crossed(some: Sequence[TrainingPair]) -> list[TrainingPair]:
    """Return the pairs with a wave across the clean pictures, of one sign or the other."""
    signs = seeds.philox("wave", len(some)).choice((-1, 1), len(some))
    return [
        replace(pair, hq_u8=np.clip(pair.hq_u8 + sign * _WAVE, 0, 255).astype(np.uint8))
        for pair, sign in zip(some, signs, strict=True)
    ]


def batches(some: Sequence[TrainingPair], name: str) -> Iterator[Batch]:
    """Yield batches without end."""
    for step in range(sys.maxsize):
        chosen = seeds.philox(name, step).integers(0, len(some), BATCH)
        yield batch_of([some[i] for i in chosen])


def batch_of(some: Sequence[TrainingPair]) -> Batch:
    """Return pairs as one batch."""
    stacked = {"hq": np.stack([p.hq_u8 for p in some]), "lq": np.stack([p.lq_u8 for p in some])}
    return {name: torch.from_numpy(pixels) for name, pixels in stacked.items()}


def trained(learner: Learner, source: Iterator[Batch], steps: int) -> ConvUNet:
    """Train for some steps and return the averaged weights."""
    for _ in range(steps):
        learner.step(next(source))
    return cast(ConvUNet, learner.state.ema.module)


def psnr(pictures: Tensor, truth: Tensor) -> float | None:
    """Return the PSNR of all pixels together, in dB, None of equal pictures; both in [-1, 1]."""
    found = float(-10 * torch.log10(((pictures - truth) / 2).square().mean()))
    return None if math.isinf(found) else found


def grain(pictures: Tensor, truth: Tensor, scale: int = 4) -> float:
    """Return mean |log2(power / power of the truth)| over frequencies above the limit of the degraded
    picture, 1 / (2 scale) cycles a pixel, along either axis. Powers are means over pictures and channels.
    """
    powers = [torch.fft.rfft2(one).abs().square().mean((0, 1)) for one in (pictures, truth)]
    rows = torch.fft.fftfreq(truth.shape[2]).abs()[:, None]
    columns = torch.fft.rfftfreq(truth.shape[3])[None]
    beyond = torch.maximum(rows, columns) > 1 / (2 * scale)
    return float((powers[0] / powers[1]).log2().abs()[beyond].mean())


def contrast(pictures: Tensor) -> float:
    """Return the mean contrast of the wave, 1 where no pixel of the truth was clipped."""
    wave = torch.from_numpy(_WAVE[..., 0]).float() / 127.5
    along = (pictures * wave).mean((1, 2, 3)) / wave.square().mean()
    return float(along.abs().mean())


class Test:
    """Pictures that nobody trained on, and noise for each."""

    def __init__(self, some: Sequence[TrainingPair]) -> None:
        batch = batch_of(some)
        self.truth, self.lq = (to_unit_range(batch[name]) for name in ("hq", "lq"))
        self.stage = PixelUnshuffle(4)
        self.y0 = self.stage.encode(upsample(self.lq, 4))
        self.noise = torch.randn(self.y0.shape, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def made(self, run: RunConfig, network: nn.Module, schedule: ScheduleConfig) -> Tensor:
        """Return what a network makes of the pictures with a schedule, without noise between its steps."""
        chain = ShiftSchedule.from_config(schedule)
        denoise = network_denoiser(
            network, self.lq, self.y0, chain, run.model.target, sees_y0=run.model.unet.sees_y0
        )
        x0 = sample(denoise, self.y0, chain, lambda _: self.noise, Sampler.DDIM)
        return self.stage.decode(x0).clamp(-1, 1)


def of_a_chain(num_test: int, factor: float) -> dict[str, dict[str, float | None]]:
    """Return the figures of a chain, and of its students of one step."""
    steps, taught_steps = round(3000 * factor), round(400 * factor)
    test = Test(crossed(pairs(1000, num_test)))
    source, stage = crossed(pairs(0, 512)), PixelUnshuffle(4)
    run = run_of((32, 64), steps, chain=4)
    teacher = trained(
        DiffusionLearner(run, build_network(run), Objective(run.model, run.loss, stage)),
        batches(source, "teacher"),
        steps,
    )
    shorter = replace(run, train=replace(run.train, steps=taught_steps))
    student = with_settings(
        student_run(shorter, "teacher", "", run.model), ["optim.lr=1e-4", "optim.lr_end=1e-5"]
    )
    assert student.distill is not None
    model, loss, distill = student.model, student.loss, student.distill
    rsd = with_settings(student, ["distill.form=rsd", "distill.fake_steps=2", "distill.adversary=0.003"])
    alone = AtTheEnd(model, loss, stage)
    learners: dict[str, Callable[[ConvUNet], Learner]] = {
        "alone": lambda net: DiffusionLearner(replace(student, distill=None), net, alone),
        "sinsr": lambda net: DiffusionLearner(
            student, net, Distillation(model, loss, distill, teacher, stage)
        ),
        "rsd": lambda net: RsdLearner(rsd, net, Objective(model, loss, stage), teacher),
    }
    whole = test.made(run, teacher, teacher_config(model).schedule)
    shown = {"truth": test.truth, "teacher, 4 steps": whole}
    shown["teacher, 1 step"] = test.made(run, teacher, model.schedule)
    seconds: dict[str, float] = {}
    for name, learner in learners.items():
        started = time.process_time()
        network = copy.deepcopy(teacher).requires_grad_(True)
        network = trained(learner(network), batches(source, "student"), taught_steps)
        seconds[name] = time.process_time() - started
        shown[name] = test.made(run, network, model.schedule)
    return {
        name: {
            "psnr": psnr(one, test.truth),
            "grain": grain(one, test.truth),
            "wave": contrast(one),
            "teacher": psnr(one, whole),
        }
        | ({"cpu_s": seconds[name]} if name in seconds else {})
        for name, one in shown.items()
    }


class AtTheEnd(Objective):
    """The loss of the chain at its last step, in the place of a distillation: the student is asked as it will
    be.
    """

    def predict(
        self, network: nn.Module, hq: Tensor, lq: Tensor, t: Tensor, noise: Tensor, mask: Tensor | None = None
    ) -> Any:
        """Return what the network says at the end of the chain that it was trained with."""
        trained_steps = self.model.schedule.trained_steps or 1

        def at_end(x: Tensor, t: Tensor, *rest: Tensor | None) -> Tensor:
            return network(x, t + trained_steps - 1, *rest)

        return super().predict(at_end, hq, lq, t, noise, mask)  # type: ignore[arg-type]


def of_any_model(num_test: int, factor: float) -> dict[str, dict[str, float | None]]:
    """Return the figures of a large network that saw many pairs, and of small ones that saw few."""
    test = Test(pairs(1000, num_test))
    large, small = (
        run_of(channels, round(steps * factor), chain=1)
        for channels, steps in (((48, 96), 1500), ((16, 24), 600))
    )

    def regression(run: RunConfig, source: Iterator[Batch]) -> ConvUNet:
        network = build_unet(run.model.unet)
        assert isinstance(network, ConvUNet)
        objective = Objective(run.model, run.loss, PixelUnshuffle(4))
        return trained(DiffusionLearner(run, build_network(run), objective), source, run.train.steps)

    teacher = regression(large, batches(pairs(0, 512), "teacher"))
    few, stage = pairs(0, 48), PixelUnshuffle(4)

    @torch.no_grad()
    def taught(pair: TrainingPair) -> StoredPair:
        lq = to_unit_range(torch.from_numpy(pair.lq_u8[None]))
        y0 = stage.encode(upsample(lq, 4))
        denoise = network_denoiser(
            teacher, lq, y0, ShiftSchedule.from_config(large.model.schedule), large.model.target
        )
        made = stage.decode(denoise(y0, torch.zeros(1, dtype=torch.int64))).clamp(-1, 1)
        taught_u8 = ((made[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
        files = (encode(Picture(pixels=one), "png") for one in (pair.hq_u8, pair.lq_u8, taught_u8))
        return StoredPair(*files)

    stored = [taught(pair) for pair in few]

    def source(share: float) -> Iterator[Batch]:
        crop = DataConfig(crop_px=CROP_PX, taught=share)
        for step in range(sys.maxsize):
            chosen = seeds.philox("student", step).integers(0, len(stored), BATCH)
            yield batch_of([stored_pair(stored[i], str(i), step, 0, crop, 4) for i in chosen])

    networks = {name: regression(small, source(share)) for name, share in SHARES.items()}
    shown = {"large": test.made(large, teacher, large.model.schedule)}
    shown |= {name: test.made(small, network, small.model.schedule) for name, network in networks.items()}
    return {
        name: {
            "psnr": psnr(one, test.truth),
            "grain": grain(one, test.truth),
            "teacher": psnr(one, shown["large"]),
        }
        for name, one in shown.items()
    }


SHARES = {"truth": 0.0, "taught": 1.0, "both": 0.5}


def main() -> int:
    """Train everything and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps")
    parser.add_argument("--write", action="store_true", help="write a file in benchmarks/results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    num_test, factor = (32, 0.1) if chosen.quick else (128, 1.0)
    started = time.process_time()
    found = {"chain": of_a_chain(num_test, factor), "any model": of_any_model(num_test, factor)}
    header = ["psnr", "grain", "wave", "teacher", "cpu_s"]
    rows = [
        [f"{part}: {name}", *map(one.get, header)]
        for part, ones in found.items()
        for name, one in ones.items()
    ]
    print(record.table(["", *header], rows))
    where = record.machine(torch.device("cpu"))
    figures = {"benchmark": "teachers", "machine": where, **found, "cpu_s": time.process_time() - started}
    if chosen.write:
        record.write(record.RESULTS / record.file_name("teachers", where), figures)
    print(record.json_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
