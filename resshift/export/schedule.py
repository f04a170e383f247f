"""What another tool needs beside the graphs: the schedule as numbers, and the chain in words."""

from __future__ import annotations

from typing import Any

from resshift.config import ModelConfig
from resshift.export.graphs import Graph
from resshift.schedule import ShiftSchedule

_ARRAYS = (
    "eta",
    "noise_std",
    "posterior_coef_xt",
    "posterior_coef_x0",
    "posterior_variance",
    "ddim_coef_xt",
    "ddim_coef_x0",
    "ddim_coef_y0",
)


def chain_description(name: str, config: ModelConfig, graphs: tuple[Graph, ...]) -> dict[str, Any]:
    """Return the content of `schedule.json`; arrays have length T, entry i is the step t = i of the graph."""
    schedule = ShiftSchedule.from_config(config.schedule)
    stage = config.first_stage
    rearranges = stage.kind == "pixel_unshuffle"
    encoded = f"pixel_unshuffle(., {stage.factor})" if rearranges else "encoder(.)"
    start = f"bicubic(lq, {config.scale}, a = -0.75, half-pixel centres)"
    if any(graph.name == "regression" for graph in graphs):
        start = "regression(lq)"
    return {
        "name": name,
        "scale": config.scale,
        "first_stage": stage.kind,
        "factor": stage.factor,
        "latent_channels": stage.channels,
        "lq_ratio": config.unet.lq_ratio,
        "steps": schedule.steps,
        "kappa": schedule.kappa,
        **{array: getattr(schedule, array).tolist() for array in _ARRAYS},
        "chain": [
            f"lq: picture in [-1, 1], sides extended to multiples of {config.size_multiple_px} by reflection",
            f"y0 = {encoded.replace('.', start)}",
            "x_t = y0 + noise_std[T - 1] * normal()",
            "for t = T - 1 ... 0:",
            f"    x0_pred = step({', '.join(_inputs(graphs))})",
            "    x_t = posterior_coef_xt[t] * x_t + posterior_coef_x0[t] * x0_pred"
            " + sqrt(posterior_variance[t]) * normal()",
            "    or, without noise: x_t = ddim_coef_xt[t] * x_t + ddim_coef_x0[t] * x0_pred"
            " + ddim_coef_y0[t] * y0",
            f"hq = {f'pixel_shuffle(x_t, {stage.factor})' if rearranges else 'decoder(x_t)'}",
        ],
        "graphs": {
            graph.name: {
                "inputs": {key: list(value) for key, value in _shapes(graph).items()},
                "output": graph.output,
                "sides_are_multiples_of": graph.multiple,
            }
            for graph in graphs
        },
    }


def _inputs(graphs: tuple[Graph, ...]) -> list[str]:
    (step,) = (graph for graph in graphs if graph.name == "step")
    return list(step.examples(1, step.window, step.window))


def _shapes(graph: Graph) -> dict[str, tuple[str | int, ...]]:
    """Return the inputs of a graph with their shapes; sides are given for a first input of h x w."""
    inputs = graph.examples(1, graph.window, graph.window)

    def side(value: int, letter: str) -> str:
        return letter if value == graph.window else f"{value // graph.window}{letter}"

    return {
        name: ("B",)
        if value.ndim == 1
        else ("B", value.shape[1], side(value.shape[2], "h"), side(value.shape[3], "w"))
        for name, value in inputs.items()
    }
