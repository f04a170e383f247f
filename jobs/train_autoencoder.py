"""Train a VQ autoencoder, the first stage of the released presets, or measure one.

    python jobs/train_autoencoder.py --preset vq-f4 --data shards --out runs/vq --workers 4
    python jobs/train.py --preset realsr-x4-s4 --data shards --out runs/sr \\
        --set train.first_stage_weights=runs/vq/model/model.safetensors
    python jobs/train_autoencoder.py --preset vq-f4 --init autoencoder_vq_f4.pth --report photos --out report

With --report nothing is trained: the pictures of a folder are encoded, quantised and decoded, and
OUT/report.json and OUT/pictures.png show the loss of quality. A model cannot restore what its first stage
cannot reproduce: if PSNR here is not well above what you need, train another first stage. To resume a
training run, run the same command again.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.command import Exit, UsageError, parser, run
from pipelines.training.command import add_arguments, train_from


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    ending = "settings: resshift settings vq-f4"
    options = add_arguments(parser(__doc__ or "", lambda: ending), preset="vq-f4")
    options.add_argument(
        "--report",
        metavar="PHOTOS",
        help="reconstruct these pictures with the weights of --init and measure the result",
    )
    return options


def train(options: argparse.Namespace) -> Exit:
    """Train an autoencoder, or report on one."""
    from resshift.config import with_settings
    from resshift.training.autoencoder import autoencoder_preset

    config = with_settings(autoencoder_preset(options.preset), options.set)
    if options.report is None:
        return train_from(options, config)
    if options.out is None:
        raise UsageError("--report requires a folder for its files: --out DIR")
    if options.init is None:
        raise UsageError("--report requires the weights of the autoencoder: --init FILE")

    from pipelines.training.reconstruction import report

    lines, failed = report(options.report, config, options.init, options.out)
    for line in lines:
        print("  ".join(f"{cell:>12}" for cell in line))
    print(f"report: {options.out.rstrip('/')}/report.json")
    return Exit.FINISHED_WITH_FAILED_ITEMS if failed else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(train, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
