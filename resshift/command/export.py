"""Write a model for other tools, and compare what was written with the model.

    resshift export tiny-x4 --to onnx               # picture.onnx, step.onnx, schedule.json in tiny-x4-onnx
    resshift export runs/mine/model --to torch-export --out exported
    resshift export resshift_realsrx4_s4_v3.pth --to safetensors --first-stage autoencoder_vq_f4.pth
    resshift export runs/mine/model --to hf --out hf://OWNER/NAME --licence apache-2.0

Formats: onnx and torch-export (graphs and a description of the chain), safetensors (a model directory), hf
(the same with a card). Needs: pip install 'resshift[export]' for onnx, 'resshift[models]' for hf://.
docs/export.md says what the files hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from resshift.command import Exit, UsageError
from resshift.export import FORMATS, model_name


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_argument("model", metavar="MODEL", help="name, model directory or weight file")
    arguments.add_argument("--to", required=True, choices=FORMATS, help="format")
    arguments.add_argument("--out", metavar="DIR", help="new or empty directory, or hf://OWNER/NAME with hf")
    arguments.add_argument("--preset", metavar="NAME", help="preset that a bare weight file belongs to")
    arguments.add_argument("--first-stage", metavar="FILE", help="weights of the autoencoder of a bare file")
    arguments.add_argument("--licence", metavar="ID", help="licence of the weights in the card of hf")


def run(options: argparse.Namespace) -> Exit:
    """Export, and print each comparison and the files."""
    from resshift.export.hub import HUB, push, repository_of
    from resshift.models import locate_model

    pushes = str(options.out).startswith(HUB)
    if pushes and options.to != "hf":
        raise UsageError(f"--out {HUB}OWNER/NAME needs --to hf, got --to {options.to}")
    repository = repository_of(str(options.out)) if pushes else ""
    found = locate_model(options.model, preset_name=options.preset, first_stage=options.first_stage)

    from resshift.export.formats import export_model
    from resshift.export.parity import ParityError

    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary if pushes else options.out or f"{model_name(found)}-{options.to}")
        try:
            for parity in export_model(found, options.to, directory, licence=options.licence):
                print(parity)
        except ParityError as error:
            sys.stderr.write(f"error: {error}\n")
            return Exit.FAILED
        for path in sorted(directory.iterdir()):
            print(f"{path.name if pushes else path}: {path.stat().st_size:,} bytes")
        if pushes:
            print(f"pushed to {push(directory, repository)}")
    return Exit.COMPLETE
