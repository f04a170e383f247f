"""Evaluate a model on pictures with known truth, beside bicubic upsampling.

    python jobs/evaluate.py --model tiny-x4 --data set5/lq:set5/gt --out report
    python jobs/evaluate.py --model runs/tiny/model --data s3://bucket/lq:s3://bucket/gt --out report --lpips-net squeeze
    python jobs/evaluate.py --model tiny-x4 --data photos --out report          no truth: pictures only
    ray job submit --working-dir . -- python jobs/evaluate.py --model tiny-x4 --data s3://b/lq:s3://b/gt --out s3://b/report

Writes report.csv (a line a picture), summary.json (means and how they were made) and report.html (LR / bicubic / ours / GT).

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from pipelines.command import Exit, UsageError, connect_to_ray, parser, quiet_ray_data, run

MOST_PICTURES_ON_THE_PAGE = 32


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("--model", required=True, help="name, model directory or weight file")
    options.add_argument("--data", required=True, metavar="LQ_DIR[:GT_DIR]", help="pictures are matched by name without extension")
    options.add_argument("--out", required=True, metavar="REPORT_DIR")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--tile", type=int, metavar="PX", help="side of a tile in input pixels (default: chosen, up to 256)")
    options.add_argument("--border", type=int, default=0, metavar="PX", help="cut from the outputs before measuring (default 0)")
    options.add_argument(
        "--lpips-net", choices=["alex", "vgg", "squeeze"], help="also measure LPIPS (default: squeeze when a trunk is given)"
    )
    options.add_argument("--lpips-trunk", metavar="FILE", help="weights of the LPIPS trunk; without it torchvision downloads them")
    options.add_argument("--replicas", type=int, default=1, help="replicas of the model (default 1)")
    options.add_argument("--dry-run", action="store_true", help="match the pictures, write nothing")
    return options


def evaluate(options: argparse.Namespace) -> Exit:
    """Match pictures, evaluate them on Ray, write the report."""
    from rich.progress import track

    from pipelines.evaluate import EvaluateOptions, averages, card, pair_up, summary_table, to_csv
    from pipelines.evaluate import evaluate as run_evaluation
    from pipelines.page import comparison_page
    from resshift import storage
    from resshift.upscaler import locate_model

    model = locate_model(options.model)
    lq_root, *rest = re.split(r":(?!//)", options.data)  # the colon of s3:// separates nothing
    if len(rest) > 1 or options.replicas < 1:
        raise UsageError(f"--data must be LQ_DIR or LQ_DIR:GT_DIR and --replicas at least 1, got {options.data!r}, {options.replicas}")
    try:
        pairs = pair_up(lq_root, rest[0] if rest else None)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print(f"{len(pairs)} pictures{'' if rest else ', no truth'}")
    if options.dry_run:
        return Exit.COMPLETE

    connect_to_ray(num_cpus=options.replicas + 3)
    quiet_ray_data()
    settings = EvaluateOptions(
        model=options.model,
        seed=options.seed,
        tile_px=options.tile,
        border=options.border,
        lpips_net=options.lpips_net or ("squeeze" if options.lpips_trunk else None),
        lpips_trunk=options.lpips_trunk,
    )
    results = sorted(
        track(run_evaluation(pairs, settings, options.replicas), total=len(pairs), description="evaluating"),
        key=lambda item: item[0]["key"],
    )
    records = [record for record, _ in results]
    failed = [record for record in records if record["status"] != "ok"]
    means = averages(records)
    facts = {
        "model": f"{model.name} ({model.identity()})",
        "data": storage.printable(options.data),
        "pictures": str(len(records) - len(failed)),
    }
    facts |= {name: str(value) for name, value in asdict(settings).items() if name not in ("model", "lpips_trunk") and value is not None}
    table = summary_table(means)
    page = comparison_page(
        title=f"{model.name} on {lq_root.rstrip('/').rsplit('/', 1)[-1]}",
        lead=f"{len(records) - len(failed)} pictures, upscaled {model.config.scale}x. Bicubic is MATLAB's imresize.",
        cards=[card(*result) for result in results if result[0]["status"] == "ok"][:MOST_PICTURES_ON_THE_PAGE],
        summary=table if len(table) > 1 else (),
        facts=facts,
    )
    summary = {"means": means, "settings": asdict(settings), "identity": model.identity(), "pictures": len(records), "failed": len(failed)}
    for name, text in (("report.csv", to_csv(records)), ("summary.json", json.dumps(summary, indent=2) + "\n"), ("report.html", page)):
        storage.write_bytes(storage.join(options.out, name), text.encode())

    for line in table:
        print("  ".join(f"{cell:>10}" for cell in line))
    for record in failed:
        print(f"failed {record['key']}: {record['reason']}: {record['message'].splitlines()[-1]}")
    print(f"report: {options.out.rstrip('/')}/report.html")
    return Exit.FINISHED_WITH_FAILED_ITEMS if failed else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(evaluate, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
