"""The files of an evaluation: summary.json, report.csv, records.jsonl and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation import results
from pipelines.evaluation.page import Card, comparison_page
from pipelines.evaluation.protocols import Protocol
from pipelines.evaluation.results import Record
from resshift import storage


@dataclass(frozen=True, slots=True)
class Written:
    """What a report says: its table with a header row, and (name, record) of the pictures without figures."""

    table: list[list[str]]
    failed: list[tuple[str, Record]]


def write(
    out: str,
    facts: Mapping[str, Any],
    records: Sequence[Record],
    protocol: Protocol | None,
    cards: Sequence[Card],
) -> Written:
    """Write the report; summary.json last, so that a report that has one is whole.

    Args:
        out: directory.
        facts: model, against, names (of the methods), settings, versions.
        records: of all pictures.
        protocol: how they were measured, if by a frozen one.
        cards: of the pictures on the page.
    """
    model, names, settings = facts["model"], facts["names"], facts["settings"]
    comparable = protocol.measured_with(settings["lpips_net"]) if protocol else None
    sets = results.by_set(records)
    ordered = [record for members in sets.values() for record in members]
    failed = [(results.identity(record), record) for record in ordered if record["status"] != "ok"]
    num_ok = len(ordered) - len(failed)
    table = results.table(ordered, names, comparable)

    shown = {name: str(value) for name, value in settings.items() if value not in (None, [], ())}
    if protocol and protocol.pictures not in (None, num_ok):
        shown["published figures"] = f"means of {protocol.pictures} pictures; these are of {num_ok}"
    versions = {name: value for name, value in facts["versions"].items() if name in ("resshift", "torch")}
    page = comparison_page(
        title=f"{names['ours']} on {', '.join(sets)}",
        lead=(
            f"{num_ok} pictures, upscaled {model['scale']}x. Bicubic is MATLAB's imresize. Intervals: 95 %, "
            "by bootstrap over pictures."
        ),
        cards=cards,
        summary=table if len(table) > 1 else (),
        histograms=results.histograms(ordered, names),
        facts={"model": f"{model['name']} ({model['identity']}), steps: {model['steps']}"} | shown | versions,
    )
    summary = results.summary(ordered, facts, comparable, model["name"])
    for name, text in (
        ("report.csv", results.to_csv(ordered)),
        ("records.jsonl", results.to_lines(ordered)),
        ("report.html", page),
        ("summary.json", json.dumps(summary, indent=2) + "\n"),
    ):
        storage.write_bytes(storage.join(out, name), text.encode())
    return Written(table, failed)
