"""Train a model on shards of photos, on any number of workers.

    python jobs/train.py --preset tiny-x4-swin --data shards --out runs/tiny --val set5/lq:set5/gt \\
        --set train.steps=10000
    ray job submit --working-dir . -- python jobs/train.py --preset realsr-x4-s4 --workers 2:8 \\
        --data s3://bucket/shards --out s3://bucket/runs/realsr \\
        --set train.first_stage_weights=s3://bucket/weights/autoencoder_vq_f4.pth \\
        --set loss.lpips_trunk=s3://bucket/weights/vgg16-397923af.pth

To resume, run the same command again: the run continues from its latest checkpoint, with any number of
workers. OUT holds run.json, checkpoints (step-*), metrics/, validation/, samples/, tensorboard/ and, at the
end, model/, for `jobs/upscale.py --model OUT/model` and `Upscaler.from_pretrained`.

Exit codes: 0 complete, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.command import Exit, parser, run
from pipelines.training.command import add_arguments, train_from


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    return add_arguments(parser(__doc__ or "", _settings), preset="tiny-x4")


def _settings() -> str:
    from resshift.presets import preset
    from resshift.settings import listing

    sections = ("train", "optim", "loss", "data", "validation", "log")
    shown = listing(preset("tiny-x4"), sections)
    return f"settings, with the values of tiny-x4 (more: resshift settings PRESET):\n{shown}"


def train(options: argparse.Namespace) -> Exit:
    """Build the configuration, check it against the data and the run directory, and train."""
    from resshift.config import with_settings
    from resshift.presets import preset

    return train_from(options, with_settings(preset(options.preset), options.set))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(train, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
