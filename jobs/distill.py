"""Train a one-step student of a chain, on shards of photos, on any number of workers.

    python jobs/distill.py --preset tiny-x4-s4 --teacher runs/chain --data shards --out runs/student
    python jobs/distill.py --preset realsr-x4-s15 --teacher realsr-x4-s15 --data s3://b/shards \\
        --out s3://b/runs/student --workers 2:8 --set train.steps=30000 --set train.first_stage_weights=vq-f4
    python jobs/evaluate.py --model runs/student --against runs/chain --data val/lq:val/gt --out report

Data, degradation and optimiser are those of the preset, which the teacher must be a model of. The student
begins with the teacher's weights (or --init), and learns in one of two forms:

- `--set distill.form=sinsr`, the default (resshift/training/distillation.py): to end where the teacher's
  chain without noise ends, to go back from there, and from the truth. The weights of the last two terms are
  distill.inverse and distill.truth.
- `--set distill.form=rsd` (resshift/training/rsd.py): to make pictures on which a chain that is trained on
  them, the fake network, becomes the teacher; with loss.lpips and distill.adversary.

To resume, run the same command again; runs, logs and checkpoints are those of jobs/train.py.

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
    options = add_arguments(parser(__doc__ or ""), preset="tiny-x4-s4")
    options.add_argument("--teacher", required=True, metavar="MODEL", help="the chain to learn from")
    return options


def distil(options: argparse.Namespace) -> Exit:
    """Build the configuration of the student from its teacher, and train."""
    from resshift.config import with_settings
    from resshift.models import locate_model
    from resshift.presets import preset
    from resshift.training.distillation import student_run

    teacher = locate_model(options.teacher)
    of_terms = [setting for setting in options.set if setting.startswith("distill.")]
    run_of_teacher = with_settings(
        preset(options.preset), [setting for setting in options.set if setting not in of_terms]
    )
    student = student_run(run_of_teacher, options.teacher, teacher.identity(), teacher.config)
    options.init = options.init or options.teacher
    return train_from(options, with_settings(student, of_terms))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(distil, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
