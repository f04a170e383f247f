"""Verification: every way in which an output can differ from its row."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from pipelines.ledger import ledger
from pipelines.ledger.ledger import Row
from pipelines.ledger.verify import verify, verify_row
from tests.pictures import encoded


def ok(key: str, data: bytes, **values: Any) -> Row:
    """Return the row of an input of 3 x 2 pixels whose output is `data`."""
    known: dict[str, Any] = {
        "output": f"{key}_x4.png",
        "sha256_out": hashlib.sha256(data).hexdigest(),
        "width_in": 3,
        "height_in": 2,
        "width_out": 12,
        "height_out": 8,
    }
    return ledger.row(key, "e", "ok", **known | values)


def test_verification_names_what_is_not_as_recorded(tmp_path: Path) -> None:
    data = encoded(0, 8, 12)
    rows = [ok(key, data) for key in "abcd"]
    for row in rows:
        (tmp_path / row["output"]).write_bytes(data)
    assert [verify_row(row, str(tmp_path), 4) for row in rows] == [None] * 4
    (tmp_path / "b_x4.png").write_bytes(b"changed")
    (tmp_path / "c_x4.png").write_bytes(encoded(9, 8, 12))
    (tmp_path / "d_x4.png").unlink()
    problems = [verify_row(row, str(tmp_path), 4) or "" for row in rows]
    assert [problem.split(":")[0] for problem in problems] == ["", "corrupt", "corrupt", "missing"]
    assert "sha256 differs" in problems[1]


def test_verification_decodes_and_measures_what_has_no_digest(tmp_path: Path) -> None:
    """Rows of `--if-exists skip` know nothing of their outputs, and old rows no sizes of their inputs."""
    (tmp_path / "a_x4.png").write_bytes(b"changed")
    (tmp_path / "b_x4.png").write_bytes(encoded(0, 8, 16))
    undigested = [ok(key, b"", sha256_out="") for key in "ab"]
    first, second = (verify_row(row, str(tmp_path), 4) or "" for row in undigested)
    assert first.startswith("corrupt: a_x4.png: ")
    assert second == "corrupt: b_x4.png: 16x8, the ledger says 12x8"
    unmeasured = dict.fromkeys(("width_in", "height_in", "width_out", "height_out"))
    assert verify_row(ok("b", b"", sha256_out="", **unmeasured), str(tmp_path), 4) is None


def test_verification_finds_what_no_row_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    data = encoded(0, 8, 12)
    ledger.append(str(out), [ok("a", data)])
    (out / "sub").mkdir()
    (out / "a_x4.png").write_bytes(data)
    (out / "sub" / "stray.png").write_bytes(b"?")
    assert list(verify(str(out), 4)) == [("extra: sub/stray.png: no row names it", None)]
    assert next(verify(str(out), 2)) == ("corrupt: a_x4.png: 12x8 is not 2 times the input", "a")
    (out / "a_x4.png").unlink()
    missing = next(verify(str(out), 4))
    assert missing.line.startswith("missing: a_x4.png")
    assert missing.key == "a"
