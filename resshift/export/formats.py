"""Writers of the formats. Each reads back what it wrote and yields the comparisons with the model."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from resshift import weights
from resshift.config import ConfigError
from resshift.export import Format, chain_config, check_directory, model_name
from resshift.export.card import model_card
from resshift.export.graphs import Graph, graphs_of
from resshift.export.parity import CHECKED, TRACED, Parity, Run, check
from resshift.export.schedule import chain_description
from resshift.models import ModelFiles
from resshift.upscaler import load_networks

_SUFFIX: dict[Format, str] = {"onnx": ".onnx", "torch-export": ".pt2"}


def export_model(
    found: ModelFiles, to: Format, directory: Path, *, licence: str | None = None
) -> Iterator[Parity]:
    """Write a model in another format and yield the comparisons with the model itself.

    Args:
        found: The model.
        to: Format.
        directory: Where the files go; new or empty.
        licence: Licence of the weights in the card of "hf", as the Hub spells it; None: of a model that ships
            the package's, otherwise unknown.

    Raises:
        ConfigError: The directory has files, the model has no chain, or a package is missing.
        WeightsError: The weights do not fit the model, or those of the autoencoder are missing.
        ParityError: What was written does not compute what the model computes.
    """
    check_directory(directory)
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _imported(package)
    graphs = model_graphs(found)
    directory.mkdir(parents=True, exist_ok=True)
    if to == "onnx" or to == "torch-export":
        for graph in graphs:
            path = directory / (graph.name + _SUFFIX[to])
            yield from _to_onnx(graph, path) if to == "onnx" else _to_torch_export(graph, path)
        text = json.dumps(chain_description(model_name(found), chain_config(found), graphs), indent=2)
        (directory / "schedule.json").write_text(text + "\n")
    else:
        yield from _to_safetensors(found, graphs, directory)
        if to == "hf":
            (directory / "README.md").write_text(model_card(found, licence))


def model_graphs(found: ModelFiles) -> tuple[Graph, ...]:
    """Return the graphs of a model, with its weights.

    Raises:
        ConfigError: The model has no chain.
        WeightsError: The weights do not fit, or those of the autoencoder are missing.
    """
    config = chain_config(found)
    unet, stage = load_networks(found)
    assert stage is not None
    return graphs_of(config, unet, stage)


def _dynamic(inputs: Mapping[str, Tensor], size: Any) -> dict[str, dict[int, Any]]:
    axes = {name: (0,) if value.ndim == 1 else (0, 2, 3) for name, value in inputs.items()}
    return {name: {axis: size(name, axis) for axis in found} for name, found in axes.items()}


def _traced_inputs(graph: Graph) -> dict[str, Tensor]:
    batch, rows, columns = TRACED
    return graph.examples(batch, rows * graph.window, columns * graph.window)


def _to_torch_export(graph: Graph, path: Path) -> Iterator[Parity]:
    inputs = _traced_inputs(graph)
    shapes = _dynamic(inputs, lambda name, axis: Dim.AUTO)
    with torch.no_grad():
        torch.export.save(torch.export.export(graph.module, (), kwargs=inputs, dynamic_shapes=shapes), path)
    module: nn.Module = torch.export.load(path).module()
    with torch.inference_mode():
        yield from check(graph, lambda values: module(**values))


def write_onnx(graph: Graph, path: Path) -> None:
    """Write a graph as an ONNX file whose batch, height and width are free."""
    inputs = _traced_inputs(graph)
    axis_names = {0: "batch", 2: "height", 3: "width"}
    first = next(iter(inputs))

    def name(of: str, axis: int) -> str:
        same = axis == 0 or inputs[of].shape[axis] == inputs[first].shape[axis]
        return axis_names[axis] if same else f"{of}_{axis_names[axis]}"

    with torch.no_grad(), warnings.catch_warnings():
        # The exporter warns of deprecations inside itself.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            graph.module,
            (),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=_dynamic(inputs, name),
            input_names=list(inputs),
            output_names=[graph.output],
            verbose=False,
        )
    assert program is not None
    program.save(path)


def _to_onnx(graph: Graph, path: Path) -> Iterator[Parity]:
    write_onnx(graph, path)
    yield from check(graph, onnx_runtime(path, graph.output), ((1, 1, 1), *CHECKED))


def onnx_runtime(path: Path, output: str) -> Run:
    """Return an ONNX file as a function of tensors that ONNX Runtime computes on the CPU."""
    session = _imported("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(values: Mapping[str, Tensor]) -> Tensor:
        arrays = {name: value.numpy() for name, value in values.items()}
        return torch.from_numpy(session.run([output], arrays)[0])

    return run


def _to_safetensors(found: ModelFiles, graphs: tuple[Graph, ...], directory: Path) -> Iterator[Parity]:
    """Write the tensors in the precision of their files."""
    copy = weights.copy_model(found, directory)
    for graph, again in zip(graphs, model_graphs(copy), strict=True):
        module = again.module
        with torch.inference_mode():
            yield from check(graph, lambda values, module=module: module(**values), CHECKED[:1])


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"ONNX needs the package {package}: pip install 'resshift[export]'") from None
