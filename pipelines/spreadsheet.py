"""Cells of CSV files that people open in a spreadsheet."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def cell(value: Value) -> Value | str:
    """Return a value as a cell shows it: a text that a spreadsheet would compute gets an apostrophe in front.
    Names of files may come from strangers.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value
