"""Evaluate a model on pictures with ground truth, beside bicubic upsampling and optionally another model.

    python jobs/evaluate.py --model tiny-x4 --data set5/lq:set5/gt --out report
    python jobs/evaluate.py --model tiny-x4 --data set5=set5/lq:set5/gt --data real=photos --out report
    python jobs/evaluate.py --model runs/mine/model --against tiny-x4 --data val/lq:val/gt --out report
    python jobs/evaluate.py --model realsr-x4-s15 --protocol imagenet-test --data test/lq:test/gt --out report
    python jobs/evaluate.py --merge report-1 report-2 --out report
    ray job submit --working-dir . -- \\
        python jobs/evaluate.py --model tiny-x4 --data s3://b/lq:s3://b/gt --out s3://b/report

Several test sets share one table; --against adds paired differences. Writes summary.json (means and paired
differences with bootstrap intervals, and everything needed to reproduce them), report.csv (one line per
picture), records.jsonl (the input of --merge) and report.html. The numbers do not depend on the number of
replicas.

MASK_DIR has the masks of a model that fills holes, which is also measured inside them. A set without GT_DIR
has no ground truth: its pictures are shown, and measured by NIQE, CLIP-IQA and MUSIQ on
request. A protocol fixes the border, names the trunk of LPIPS and adds the published figures.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.command import (
    Exit,
    UsageError,
    add_model,
    add_sampling,
    connect_to_ray,
    model_of,
    parser,
    run,
    sampling_of,
)

if TYPE_CHECKING:
    from pipelines.evaluation.protocols import Protocol
    from pipelines.evaluation.results import Written


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    add = options.add_argument
    add_model(options)
    add(
        "--against",
        metavar="MODEL",
        help="compare with it instead of bicubic, on the same pictures and noise",
    )
    told = "test set; may be repeated. Pictures are matched by name, also as DIV2K, Set5 and RealSR have them"
    add("--data", action="append", default=[], metavar="[NAME=]LQ_DIR[:GT_DIR[:MASK_DIR]]", help=told)
    add("--out", required=True, metavar="REPORT_DIR")
    add("--merge", nargs="+", metavar="REPORT_DIR", help="merge reports of parts instead of evaluating")
    add("--protocol", help="imagenet-test, realsr or bicubic-x4 (default: none, border 0)")
    add_sampling(options)
    told = "pixels cut from the outputs before measuring (default: the protocol's, or 0)"
    add("--border", type=int, metavar="PX", help=told)
    told = "also measure LPIPS (default: the protocol's; squeeze when a trunk is given)"
    add("--lpips-net", choices=["alex", "vgg", "squeeze"], help=told)
    add(
        "--lpips-trunk",
        metavar="FILE",
        help="weights of the LPIPS trunk (default: downloaded by torchvision)",
    )
    add("--niqe", metavar="FILE", help="also measure NIQE, with these parameters (niqe_pris_params.npz)")
    told = "also measure this figure; st_lpips needs stlpips-pytorch, the others pyiqa"
    add("--iqa", action="append", default=[], choices=["st_lpips", "clipiqa", "musiq"], help=told)
    add(
        "--replicas",
        type=int,
        help="replicas of the model (default: one per GPU, else one per CPU, at most 8)",
    )
    add("--dry-run", action="store_true", help="match the pictures and write nothing")
    return options


def evaluate(options: argparse.Namespace) -> Exit:
    """Match pictures, evaluate them on Ray and write the report; or merge reports."""
    from pipelines.evaluation.protocols import PROTOCOLS

    if options.protocol is not None and options.protocol not in PROTOCOLS:
        raise UsageError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {options.protocol!r}")
    protocol = PROTOCOLS[options.protocol] if options.protocol else None
    if options.merge:
        if options.model or options.data:
            raise UsageError("--merge takes reports and cannot be combined with --model or --data")
        return merge(options.merge, options.out, protocol)
    if not options.model or not options.data:
        raise UsageError("--model and --data are required (or --merge)")
    return measure(options, protocol)


def measure(options: argparse.Namespace, protocol: Protocol | None) -> Exit:
    """Evaluate the model and write the report."""
    from pipelines.command import quiet_ray_data
    from pipelines.evaluation import evaluate as evaluation
    from pipelines.evaluation import results
    from resshift.config import ModelConfig
    from resshift.models import locate_model
    from resshift.progress import Progress, shown

    name = model_of(options.model, options)
    model = locate_model(name)
    other = locate_model(options.against) if options.against else None
    if other is not None and other.fills_holes != model.fills_holes:
        raise UsageError(f"of {model.name} and {other.name} only one fills holes: they cannot be compared")
    border = options.border if options.border is not None else protocol.border if protocol else 0
    net = options.lpips_net or (
        protocol.lpips_net if protocol else "squeeze" if options.lpips_trunk else None
    )
    if border < 0 or (options.replicas is not None and options.replicas < 1):
        raise UsageError(
            f"--border must not be negative and --replicas at least 1, got {border} and {options.replicas}"
        )
    sampling = sampling_of(options)
    has_estimate = isinstance(model.config, ModelConfig) and model.config.has_estimate
    sampling.check_for(model.name, model.config.steps, model.config.smallest_tile_px, has_estimate)
    if other is not None and other.config.scale != model.config.scale:
        raise UsageError(
            f"{options.against} enlarges {other.config.scale} times, {options.model} {model.config.scale} "
            "times"
        )
    settings = evaluation.EvaluateOptions(
        model=name,
        against=options.against,
        sampling=sampling,
        border=border,
        lpips_net=net,
        lpips_trunk=options.lpips_trunk,
        niqe_parameters=options.niqe,
        user_installed=tuple(options.iqa),
    )
    try:
        sets = [evaluation.PictureSet.parse(text) for text in options.data]
        for one in sets:
            if (one.mask_root is not None) != model.fills_holes:
                does, wanted = ("fills", "") if model.fills_holes else ("fills no", "out")
                raise UsageError(
                    f"{model.name} {does} holes: give test sets with{wanted} masks, got {one.name}"
                )
        pairs = evaluation.pairs_of(sets)
        if not options.dry_run:
            settings.judge()  # fails here if weights are missing, not in replicas that restart again
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from None
    print(f"{len(pairs)} pictures{'' if all(pair.gt_uri for pair in pairs) else ', some without truth'}")
    if options.dry_run:
        return Exit.COMPLETE

    connect_to_ray()
    quiet_ray_data()
    facts = evaluation.facts_of(settings, model, other)
    gallery = results.Gallery()
    replicas = options.replicas or evaluation.default_replicas(len(pairs))
    with shown(Progress("pictures", len(pairs))) as progress:
        for record, encoded in evaluation.evaluate(pairs, settings, replicas):
            gallery.add(record, encoded)
            progress.add(record["status"])
    cards = gallery.cards(facts["names"])
    return show(results.write(options.out, facts, gallery.records, protocol, cards), options.out)


def merge(reports: Sequence[str], out: str, protocol: Protocol | None) -> Exit:
    """Merge reports of parts; the merged page has tables and no pictures."""
    from pipelines.evaluation import results

    try:
        facts, records = results.merged([(where, *results.read(where)) for where in reports])
    except results.MergeError as error:
        raise UsageError(str(error)) from None
    return show(results.write(out, facts, records, protocol, []), out)


def show(written: Written, out: str) -> Exit:
    """Print the table and the failures."""
    for line in written.lines():
        print(line)
    print(f"report: {out.rstrip('/')}/report.html")
    return Exit.FINISHED_WITH_FAILED_ITEMS if written.failed else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(evaluate, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
