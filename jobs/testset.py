"""Make a test set from photos: clean and degraded pairs that are byte-identical in every run.

    python jobs/testset.py ILSVRC2012/val ImageNet-Test
    python jobs/testset.py ILSVRC2012_img_val.tar bicubic --protocol bicubic
    python jobs/testset.py photos mine --protocol folder --recipe realesrgan-x4
    ray job submit --working-dir . -- python jobs/testset.py s3://bucket/val s3://bucket/ImageNet-Test
    python jobs/evaluate.py --model tiny-x4 --data ImageNet-Test/lq:ImageNet-Test/gt --out report

The first example makes 3 000 pictures of 256 px with mild real-world degradation x4, the second the same
pictures with MATLAB bicubic x4. SRC is a folder, a prefix, a tar or a list, as for jobs/prepare.py. DST holds
gt/, lq/ (and mask/ for inpainting) and manifest.json with the drawn parameters and the sha256 of every file.
A bad picture gets an entry with its reason, and the next one takes its place.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines.command import (
    Exit,
    UsageError,
    check_places,
    connect_to_ray,
    parser,
    quiet_ray_data,
    run,
)

PROTOCOLS = ("imagenet-test", "bicubic", "folder")


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="folder, s3:// prefix, .tar, or .txt list of photos")
    options.add_argument("target", metavar="DST", help="where the test set goes")
    options.add_argument("--protocol", choices=PROTOCOLS, default=PROTOCOLS[0], help="default imagenet-test")
    options.add_argument("--recipe", help="degradation for --protocol folder, for example realesrgan-x4")
    options.add_argument(
        "--num", type=int, help="number of pictures (default 3000; with --protocol folder all)"
    )
    options.add_argument(
        "--seed", type=int, default=0, help="seed of the selection and the degradation (default 0)"
    )
    options.add_argument("--dry-run", action="store_true", help="list and check; write nothing")
    return options


def testset(options: argparse.Namespace) -> Exit:
    """List, make the pairs on Ray, write the manifest."""
    from pipelines.evaluation.testset import (
        bicubic_test,
        check_same_set,
        folder_test,
        imagenet_test,
        write_testset,
    )
    from pipelines.shards.prepare import with_tars_opened
    from pipelines.shards.sources import Archive, list_inputs
    from resshift.progress import Progress, shown

    check_places(options.source, options.target, "the pairs")
    if (options.recipe is not None) != (options.protocol == "folder"):
        raise UsageError("--recipe and --protocol folder must be used together")
    try:
        if options.protocol == "folder":
            protocol = folder_test(options.recipe, options.num, options.seed)
        else:
            make = imagenet_test if options.protocol == "imagenet-test" else bicubic_test
            protocol = make(3000 if options.num is None else options.num, options.seed)
        check_same_set(options.target, protocol)
        found = list(list_inputs(options.source))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(f"no files under {options.source}")
    if not options.dry_run or any(isinstance(one, Archive) for one in found):
        connect_to_ray()
        quiet_ray_data()
    items = with_tars_opened(found, None)
    total = len(items) if protocol.num is None else min(len(items), protocol.num)
    print(f"{len(items)} inputs, {total} to take -> {options.target}")
    if options.dry_run:
        return Exit.COMPLETE

    with shown(Progress("pictures", total)) as progress:
        for entry in write_testset(items, options.target, protocol):
            progress.add(entry["status"])
            if entry["status"] != "ok":
                progress.listed += protocol.num is not None  # another picture takes its place
                print(f"{entry['status']} {entry['key']}: {entry['reason']}: {entry['message']}")
    counts = progress.counts
    print(f"ok {counts['ok']}, skipped {counts['skipped']}, failed {counts['failed']}")
    return Exit.FINISHED_WITH_FAILED_ITEMS if counts["failed"] else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(testset, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
