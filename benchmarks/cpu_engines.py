"""Measure other engines than PyTorch on a CPU: one step of a chain, or one call of another network, on one
tile.

    python benchmarks/cpu_engines.py                    minutes; writes a file to benchmarks/results
    python benchmarks/cpu_engines.py --model x4plus     a network of 16.7 M: minutes, too
    python benchmarks/cpu_engines.py --quick            a few rounds, one size; nothing written

It needs `pip install openvino` beside the extra `export`.

Today's path (PyTorch with `resshift.networks.convolution`), plain PyTorch, ONNX Runtime and OpenVINO compute
the same tile in turn, round by round, in one process, so that a busy machine is busy for all. `ratio` is the
median over the rounds of the time of today's path by that of the engine, `cpu_ratio` the same of CPU time,
which other processes disturb less. Beside them: the largest difference to today's path, and whether the bytes
are the same when the call is repeated, for one and two threads, and for every place in a batch of three.
Memory is the growth of the process from before the engine is loaded to after its first calls.

The file is cpu_engines-MODEL-DATE-MACHINE.json, the last line its figures.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor

from resshift.config import ModelConfig
from resshift.devices import on_device
from resshift.export.formats import model_graphs, write_onnx
from resshift.export.graphs import Graph
from resshift.models import ModelFiles, locate_model
from resshift.networks import convolution
from resshift.upscaler import load_networks

Call = Callable[[dict[str, Tensor]], Tensor]
THREADS = (1, 2)


@dataclass
class Engine:
    """An engine with one session for each number of threads, and what it took to have them."""

    name: str
    sessions: dict[int, Call]
    import_s: float = 0.0
    create_s: float = 0.0
    memory_mb: float = 0.0


def rss_mb() -> float:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def torch_engine(name: str, module: torch.nn.Module) -> Engine:
    """Return PyTorch as an engine."""

    def session(threads: int) -> Call:
        def call(inputs: dict[str, Tensor]) -> Tensor:
            torch.set_num_threads(threads)
            with torch.inference_mode():
                return module(**inputs)

        return call

    return Engine(name, {threads: session(threads) for threads in THREADS})


def onnx_runtime(path: Path, output: str) -> Engine:
    """Return ONNX Runtime with a session for each number of threads."""
    started = time.perf_counter()
    ort: Any = importlib.import_module("onnxruntime")
    imported = time.perf_counter()

    def session(threads: int) -> Call:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: torch.from_numpy(
            made.run([output], {name: value.numpy() for name, value in inputs.items()})[0]
        )

    sessions = {threads: session(threads) for threads in THREADS}
    each = (time.perf_counter() - imported) / len(THREADS)
    return Engine("onnxruntime", sessions, imported - started, each)


def openvino(path: Path, precision: str) -> Engine:
    """Return OpenVINO with a compiled model for each number of threads."""
    started = time.perf_counter()
    ov: Any = importlib.import_module("openvino")
    imported = time.perf_counter()

    def session(threads: int) -> Call:
        settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads}
        made = ov.Core().compile_model(str(path), "CPU", settings)
        return lambda inputs: torch.from_numpy(
            made({name: value.numpy() for name, value in inputs.items()})[0].copy()
        )

    sessions = {threads: session(threads) for threads in THREADS}
    each = (time.perf_counter() - imported) / len(THREADS)
    return Engine(f"openvino {precision}", sessions, imported - started, each)


def with_memory(make: Callable[[], Engine], inputs: dict[str, Tensor]) -> Engine:
    """Make an engine and call each session once; the growth of the process is its memory."""
    before = rss_mb()
    engine = make()
    for call in engine.sessions.values():
        call(inputs)
    engine.memory_mb = rss_mb() - before
    return engine


def same_bytes(engine: Engine, batch: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, bool]:
    """Return whether an engine's result depends on the call, the threads, or the company in a batch."""
    one = {name: value[:1].contiguous() for name, value in batch.items()}
    call = engine.sessions[1]
    alone = call(one)
    call(other)
    together = call(batch)
    places = [call({name: value[i : i + 1].contiguous() for name, value in batch.items()}) for i in range(3)]
    return {
        "same_repeated": torch.equal(call(one), alone),
        "same_threads": torch.equal(engine.sessions[2](one), alone),
        "same_batch": all(torch.equal(together[i : i + 1], place) for i, place in enumerate(places)),
    }


def measured_graph(found: ModelFiles) -> Graph:
    """Return what is measured of a model: the step of a chain, or the whole network of another model."""
    if isinstance(found.config, ModelConfig):
        *_, step = model_graphs(found)
        return step
    network, _ = load_networks(found)
    network.eval().requires_grad_(False)

    def examples(batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"lq": 2 * torch.rand(batch, 3, rows, columns, generator=generator) - 1}

    smallest = found.config.smallest_tile_px
    return Graph(
        name="network", module=network, output="hq", multiple=smallest, window=smallest, examples=examples
    )


def main() -> int:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default="tiny-x4")
    chosen = parser.parse_args()
    sizes, rounds = ((64,), 3) if chosen.quick else ((64, 128), chosen.rounds)
    found = locate_model(chosen.model)
    step, ours = measured_graph(found), measured_graph(found)
    inputs = {px: step.examples(3, px, px) for px in sizes}
    first = {px: {name: value[:1].contiguous() for name, value in inputs[px].items()} for px in sizes}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step.onnx"
        write_onnx(step, path)

        def today() -> Engine:
            module = on_device(ours.module, torch.device("cpu"))
            convolution.prepare(module)
            return torch_engine("today", module)

        largest = first[max(sizes)]
        engines = [
            with_memory(make, largest)
            for make in (
                today,
                lambda: torch_engine("plain torch", step.module),
                lambda: onnx_runtime(path, step.output),
                lambda: openvino(path, "f32"),
            )
        ]
    for px in sizes:
        reference = engines[0].sessions[1](first[px])
        checks = {one.name: same_bytes(one, inputs[px], first[min(sizes)]) for one in engines}
        for threads in THREADS:
            seconds: dict[str, list[float]] = {engine.name: [] for engine in engines}
            cpu: dict[str, list[float]] = {engine.name: [] for engine in engines}
            for _ in range(rounds):
                for engine in engines:
                    started, cpu_started = time.perf_counter(), time.process_time()
                    engine.sessions[threads](first[px])
                    seconds[engine.name].append(time.perf_counter() - started)
                    cpu[engine.name].append(time.process_time() - cpu_started)
            for engine in engines:
                ratios, cpu_ratios = (
                    [a / b for a, b in zip(times["today"], times[engine.name], strict=True)]
                    for times in (seconds, cpu)
                )
                difference = engine.sessions[threads](first[px]) - reference
                rows.append(
                    {
                        "tile_px": px,
                        "threads": threads,
                        "engine": engine.name,
                        "ms": round(1000 * statistics.median(seconds[engine.name]), 1),
                        "ratio": round(statistics.median(ratios), 3),
                        "ratio_min": round(min(ratios), 3),
                        "ratio_max": round(max(ratios), 3),
                        "cpu_ms": round(1000 * statistics.median(cpu[engine.name]), 1),
                        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
                        "difference": float(difference.abs().max()),
                        **checks[engine.name],
                    }
                )
                print(record.json_line(rows[-1]), flush=True)
    costs = [
        {
            "engine": engine.name,
            "import_s": round(engine.import_s, 2),
            "create_s": round(engine.create_s, 2),
            "memory_mb": round(engine.memory_mb),
        }
        for engine in engines
    ]
    where = record.machine(torch.device("cpu"))
    where["load"] = [round(load, 2) for load in os.getloadavg()]
    where["versions"] = {
        name: importlib.import_module(name).__version__ for name in ("onnxruntime", "openvino")
    }
    for table in (rows, costs):
        print(record.table(list(table[0]), [list(row.values()) for row in table]))
    figures = {"machine": where, "rounds": rounds, "rows": rows, "costs": costs}
    if not chosen.quick:
        record.write(
            record.RESULTS / record.file_name(f"cpu_engines-{Path(chosen.model).stem}", where), figures
        )
    print(record.json_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
