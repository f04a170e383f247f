"""No cell of a report is a formula."""

from __future__ import annotations

import csv
import io

import pytest

from pipelines.evaluation.results import to_csv as csv_of_records
from pipelines.ledger import ledger
from pipelines.ledger.report import to_csv as csv_of_rows
from pipelines.spreadsheet import cell


@pytest.mark.parametrize("text", ['=HYPERLINK("x")', "@SUM(1)", "-1+1.png", "+49", "\t=1"])
def test_what_a_spreadsheet_would_compute_is_text(text: str) -> None:
    assert cell(text) == f"'{text}"
    row = ledger.row(text, text, "failed", reason="corrupt", message=text)
    table = ledger.pa.Table.from_pylist([row], schema=ledger.SCHEMA)
    lines = list(csv.DictReader(io.StringIO(csv_of_rows(table).decode(), newline="")))
    assert {lines[0][name] for name in ("key", "etag", "message")} == {f"'{text}"}
    record = {"set": text, "key": text, "status": "failed", "reason": text, "message": text}
    lines = list(csv.DictReader(io.StringIO(csv_of_records([record]), newline="")))  # pyright: ignore[reportArgumentType]
    assert {lines[0][name] for name in ("set", "key", "reason")} == {f"'{text}"}


@pytest.mark.parametrize("value", ["a=b", "photo -1.png", "", None, -1.5, 7])
def test_other_values_are_as_they_were(value: object) -> None:
    assert cell(value) is value
