"""Show training pairs of a preset: a page of clean and degraded pictures with the drawn parameters.

    python jobs/preview.py shards preview.html --preset realsr-x4-s4       the first pairs of a run
    python jobs/preview.py photos preview.html --preset tiny-x4 --num 60 --set degradation.bicubic_share=0.5
    python jobs/preview.py s3://bucket/shards s3://bucket/preview.html --preset realsr-x4-s4

SRC holds shards written by jobs/prepare.py, or is a folder or prefix of photos. OUT is one HTML file that
loads nothing.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.command import Exit, UsageError, parser, run


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="shards, or a folder of photos")
    options.add_argument("out", metavar="OUT", help="path of the page, an .html file")
    options.add_argument("--preset", required=True, help="named configuration, for example tiny-x4")
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting; may be repeated",
    )
    options.add_argument("--num", type=int, default=24, help="number of pairs (default 24)")
    return options


def preview(options: argparse.Namespace) -> Exit:
    """Make the pairs in this process and write the page."""
    from pipelines.pairs.preview import from_photos, from_shards, preview_page
    from pipelines.shards.sources import Item, list_inputs
    from resshift import storage
    from resshift.config import with_settings
    from resshift.presets import preset

    if options.num < 1:
        raise UsageError(f"--num must be at least 1, got {options.num}")
    config = with_settings(preset(options.preset), options.set)
    try:
        if storage.exists(storage.join(options.source, "manifest.json")):
            samples = list(from_shards(options.source, config, options.num))
        else:
            items = [one for one in list_inputs(options.source) if isinstance(one, Item)]
            samples = list(from_photos(items, config, options.num))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not samples:
        raise UsageError(f"no photos under {options.source}")
    facts = {
        "preset": options.preset,
        "seed": str(config.train.seed),
        "source": storage.printable(options.source),
    }
    if options.set:
        facts["settings"] = ", ".join(options.set)
    storage.write_bytes(options.out, preview_page(samples, config, facts).encode())
    num_bad = sum(sample.pair is None for sample in samples)
    print(f"{len(samples) - num_bad} pairs, {num_bad} photos without a pair -> {options.out}")
    return Exit.FINISHED_WITH_FAILED_ITEMS if num_bad else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(preview, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
