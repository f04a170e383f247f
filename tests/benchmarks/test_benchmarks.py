"""What every benchmark leans on: the timing helper, the record, and the JSON line at the end."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resshift import weights
from resshift.config import Sampling
from resshift.networks.config import RegressionConfig
from resshift.networks.regression import RegressionNet
from resshift.tiles.plan import cut_axis
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]


timing, record = load_script("benchmarks/timing.py"), load_script("benchmarks/record.py")


def scripted(seconds: list[float]) -> tuple[Callable[[Callable[[], object]], float], list[int]]:
    """Return a stopwatch that runs the call and reports `seconds` in turn, and the list of how often it
    ran.
    """
    remaining = iter(seconds)
    runs: list[int] = []

    def stopwatch(call: Callable[[], object]) -> float:
        call()
        runs.append(1)
        return next(remaining)

    return stopwatch, runs


def test_median_leaves_out_the_warm_up_and_resists_an_outlier() -> None:
    calls: list[int] = []
    stopwatch, _ = scripted([90.0, 80.0, 1.0, 2.0, 3.0, 2.0, 100.0])
    result = timing.measure(
        lambda: calls.append(1), stopwatch, warmup=2, min_calls=5, max_calls=5, limit_s=1000.0
    )
    assert len(calls) == 7
    assert (result.median_s, result.lower_quartile_s, result.upper_quartile_s, result.num_calls) == (
        2.0,
        2.0,
        3.0,
        5,
    )
    assert result.spread == 0.5


@pytest.mark.parametrize(
    ("seconds_a_call", "expected_calls"),
    [
        pytest.param(10.0, 3, id="slow: the least"),
        pytest.param(0.3, 4, id="until the limit"),
        pytest.param(0.001, 8, id="fast: the most"),
    ],
)
def test_number_of_calls_follows_the_limits(seconds_a_call: float, expected_calls: int) -> None:
    stopwatch, runs = scripted([seconds_a_call] * 20)
    result = timing.measure(lambda: None, stopwatch, warmup=1, min_calls=3, max_calls=8, limit_s=1.0)
    assert result.num_calls == expected_calls
    assert len(runs) == expected_calls + 1


def test_host_stopwatch_runs_the_call_once() -> None:
    calls: list[int] = []
    assert timing.host_stopwatch(lambda: calls.append(1)) >= 0
    assert len(calls) == 1


def test_one_call_has_no_spread() -> None:
    assert timing.Timing.of([2.0]).spread == 0.0


def test_machine_has_the_documented_keys() -> None:
    where = record.machine(torch.device("cpu"), commit="abc")
    assert set(where) == {
        *(
            "date",
            "command",
            "commit",
            "dirty",
            "python",
            "torch",
            "cuda",
            "cudnn",
            "driver",
            "gpu",
            "gpu_memory_gib",
        ),
        *("cpu", "num_cores", "num_threads", "platform"),
    }
    assert where["commit"]
    assert where["gpu"] is None
    json.dumps(where)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--write", "--write"),
        ("photos/test", "photos/test"),
        ("s3://bucket/photos", "s3://bucket/photos"),
        (f"{ROOT}/photos", "photos"),
        (f"--out={ROOT}/benchmarks/results", "--out=benchmarks/results"),
        (f"{ROOT.parent}/shared/gt", "../shared/gt"),
        ("/srv/somebody/gt", ".../gt"),
        ("--photos=/srv/somebody/gt", "--photos=.../gt"),
    ],
)
def test_commands_are_relative_to_the_repository(argument: str, expected: str) -> None:
    python = Path(sys.executable).name
    script = str(ROOT / "benchmarks" / "seams.py")
    assert (
        record.command([script, "--photos", argument]) == f"{python} benchmarks/seams.py --photos {expected}"
    )


def test_files_are_relative_to_the_repository(tmp_path: Path) -> None:
    record.write(tmp_path / "a.json", {"notes": [f"failed: no {ROOT}/a/b.png, no c.png"]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"notes": ["failed: no a/b.png, no c.png"]}


def test_dated_results_hold_no_path_of_a_machine() -> None:
    files = sorted(record.RESULTS.glob("*.json"))
    absolute = re.compile(r"""(?<![\w.:/])/[\w.-]+/[^\s"']*""")
    assert files
    assert {path.name: found for path in files if (found := absolute.findall(path.read_text()))} == {}


def test_file_name_holds_benchmark_date_and_machine() -> None:
    where = {"date": "2026-02-03T04:05:06Z", "gpu": "NVIDIA H100 80GB HBM3", "cpu": "any"}
    assert record.file_name("gpu", where) == "gpu-2026-02-03-nvidia-h100-80gb-hbm3.json"
    assert (
        record.file_name("pairs", where | {"gpu": None, "cpu": "Intel(R) Xeon(R)"})
        == "pairs-2026-02-03-intel-r-xeon-r.json"
    )


def test_written_figures_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "results" / "a.json"
    record.write(path, {"x": [1, None]})
    assert json.loads(path.read_text()) == {"x": [1, None]}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_table_aligns_numbers_to_the_right_and_shows_what_is_missing() -> None:
    assert record.table(("name", "ms"), [["a", 1.5], ["long name", None], ["b", 1234.0]]).splitlines() == [
        "name         ms",
        "---------  ----",
        "a           1.5",
        "long name     -",
        "b          1234",
    ]


def test_unknown_section_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_script("benchmarks/gpu.py").parse(["--device", "cpu", "--sections", "parity,speed"])
    assert stop.value.code == 2
    assert "unknown section speed" in capsys.readouterr().err


@pytest.mark.slow
def test_last_line_is_one_json_object_and_parity_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert load_script("benchmarks/gpu.py").main(["--device", "cpu", "--quick", "--sections", "parity"]) == 0
    printed = capsys.readouterr().out
    assert "No GPU is used" in printed
    last = json.loads(printed.splitlines()[-1])
    assert last["benchmark"] == "gpu"
    assert last["parity_passed"] is True
    assert last["parity_failed"] == last["failed"] == []
    assert last["file"] is None


def test_plain_and_fast_loop_make_the_same_picture() -> None:
    """Otherwise the ratio of their times would mean nothing. On the same tiles, float32 rounding is all that
    differs.
    """
    plain, upscale = load_script("benchmarks/plain.py"), load_script("benchmarks/upscale.py")
    fast = upscale.load("test-x4", torch.device("cpu"), "float32")
    slow = upscale.load("test-x4", torch.device("cpu"), "float32", optimise=False)
    lq = torch.rand((1, 3, 40, 24), generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = plain.upscale(slow.chain.networks(), lq, fast.plan(40, 24, Sampling(tile_px=16)), 0)
    torch.testing.assert_close(fast.upscale_tensor(lq, Sampling(tile_px=16)), expected, atol=2e-4, rtol=0)


def test_a_model_of_any_kind_is_measured_alone(tmp_path: Path) -> None:
    config = RegressionConfig(channels=4, half_channels=4, blocks_before=0, half_blocks=0, blocks_after=0)
    weights.save_model(tmp_path / "model", "ours", config, RegressionNet(config))
    upscale = load_script("benchmarks/upscale.py")
    row = upscale.measure_alone(str(tmp_path / "model"), 60, 2, torch.device("cpu"), "auto", busy=True)
    assert (row["model"], row["dtype"], row["tile"]) == ("ours", "float32", "4 of 34")
    assert len(row["all_seconds"]) == 2
    assert row["s_per_mp"] > 0


def test_a_seam_shows_in_the_ratio_and_a_clean_picture_gives_one() -> None:
    seams = load_script("benchmarks/seams.py")
    whole = np.random.default_rng(0).integers(100, 140, (64, 64, 3)).astype(np.uint8)
    edges = np.array([16, 48])
    assert seams.edge_ratio(whole, whole, edges, 0, 4) == 1.0
    stepped = whole.copy()
    stepped[16:48] += 20  # a tone step at both edges, rows 16 and 48
    assert seams.edge_ratio(stepped, whole, edges, 0, 4) > 1.2
    assert seams.edge_ratio(stepped, whole, edges, 1, 4) == pytest.approx(1.0, abs=1e-9)
    patterned = whole.copy()
    patterned[3::4] += 10  # another step between all positions than inside them is no seam
    assert seams.edge_ratio(patterned, whole, edges, 0, 4) == pytest.approx(1.0, abs=0.05)
    assert seams.delta_e(whole, whole) == 0.0


def test_edges_are_where_tiles_begin_or_end() -> None:
    axis = cut_axis(20, 12, 4)
    assert axis.starts == (0, 8)
    assert load_script("benchmarks/seams.py").edges_of(axis, 4, 80).tolist() == [32, 48]


@pytest.mark.slow
def test_failures_lays_each_case_beside_its_truth(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failures = load_script("benchmarks/failures.py")
    monkeypatch.setattr(sys, "argv", ["failures.py", "--out", str(tmp_path / "o.png")])
    assert failures.main() == 0
    page = np.asarray(Image.open(tmp_path / "o.png"))
    side = failures.SIDE_PX
    assert page.shape == (len(failures.CASES) * side, 4 * side, 3)
    for name, row in zip(failures.CASES, page.reshape(-1, side, 4 * side, 3), strict=True):
        nearest, bicubic, ours, truth = np.split(row, 4, axis=1)
        np.testing.assert_array_equal(truth, failures.CASES[name][0]())
        np.testing.assert_array_equal(nearest, nearest[::4, ::4].repeat(4, 0).repeat(4, 1))
        assert not np.array_equal(bicubic, ours)
    printed = capsys.readouterr().out
    assert all(name in printed for name in failures.CASES)
