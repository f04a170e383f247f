"""A finished run as a model to share: a directory with a card, and on request a push to a hub.

    DIR/config.json, model.safetensors [, first_stage.safetensors], README.md

`Upscaler.from_pretrained(DIR)` and `jobs/upscale.py --model DIR` take it. The card says what is known from
the run and nothing else: scores of a benchmark are the owner's to measure (`jobs/evaluate.py`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from pipelines.training.checkpoints import read_best
from pipelines.training.log import read_lines
from resshift import storage
from resshift.config import RunConfig, to_dict
from resshift.export.card import header
from resshift.export.hub import HUB, push, repository_of
from resshift.models import first_stage_file
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.checkpoint import description
from resshift.weights import read_state_dict, save_safetensors


def publish_model(checkpoint_directory: Path, out: str, config: AnyRunConfig) -> None:
    """Write OUT/model from a checkpoint: the averaged weights, the first stage when it has weights;
    config.json comes last.
    """
    target = storage.join(out, "model")
    storage.write_file(
        storage.join(target, "model.safetensors"), str(checkpoint_directory / "ema.safetensors")
    )
    if (
        isinstance(config, RunConfig)
        and config.train.first_stage_weights
        and config.model.first_stage.kind == "vq"
    ):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "first_stage.safetensors"
            save_safetensors(read_state_dict(first_stage_file(config.train.first_stage_weights)), path)
            storage.write_file(storage.join(target, path.name), str(path))
    storage.write_bytes(
        storage.join(target, "config.json"), (json.dumps(description(config), indent=2) + "\n").encode()
    )


def export(out: str, config: AnyRunConfig, step: int, target: str) -> str:
    """Copy OUT/model and its card to `target`, a directory, s3:// prefix or hf://OWNER/NAME, and return where
    it is.

    Raises:
        ConfigError: A push is wanted and huggingface_hub is not installed, or the name is malformed.
    """
    files = {
        entry.key: storage.read_bytes(entry.uri) for entry in storage.list_entries(storage.join(out, "model"))
    }
    files["README.md"] = model_card(out, config, step).encode()
    if target.startswith(HUB):
        repository = repository_of(target)
        with tempfile.TemporaryDirectory() as directory:
            for name, data in files.items():
                (Path(directory) / name).write_bytes(data)
            return push(Path(directory), repository)
    for name in sorted(files, key=lambda name: name == "config.json"):
        storage.write_bytes(storage.join(target, name), files[name])
    return target


def model_card(out: str, config: AnyRunConfig, step: int) -> str:
    """Return the card in Markdown: what was trained, on what, for how long, and what was measured while it
    trained.
    """
    record = json.loads(storage.read_bytes(storage.join(out, "run.json")))
    validation, best = read_lines(out, "validation"), read_best(out)
    train, values = config.train, to_dict(config)
    rows = [
        ("Preset", config.preset),
        ("Settings", f"fingerprint `{record['fingerprint']}`; in full at the end"),
        ("Data", f"`{record.get('data', 'unknown')}`"),
        (
            "Training",
            f"{step:,} steps of {train.batch_size} samples = {step * train.batch_size:,}, {train.precision}, "
            f"seed {train.seed}",
        ),
        ("Weights", f"moving average ({train.ema_decay}) at step {step:,}"),
        ("Software", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
    ]
    lines = [
        header(config.model, "unknown") if isinstance(config, RunConfig) else "",
        f"# Model card: {config.preset}",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {text} |" for name, text in rows),
        "",
    ]
    if validation:
        figures = [name for name in validation[0] if name != "step"]
        lines += ["## Figures on the validation set of the run", ""]
        lines += [f"| step | {' | '.join(figures)} |", f"| ---: |{' ---: |' * len(figures)}"]
        lines += [
            f"| {line['step']} | {' | '.join(f'{line[name]:.4f}' for name in figures)} |"
            for line in validation[-5:]
        ]
        lines += ["", f"Best: step {best[0]} ({best[1]:.4f})." if best else "", ""]
    limits = (
        "Use is limited by the terms of the training pictures and of the first stage, which this card does "
        "not know."
    )
    lines += ["## Limits", "", limits, ""]
    return "\n".join([*lines, "## Configuration", "", "```json", json.dumps(values, indent=2), "```", ""])
