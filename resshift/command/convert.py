"""Write a bare weight file as a model directory, which says itself what it is.

    resshift convert resshift_realsrx4_s4_v3.pth --to realsr-x4-s4 --first-stage autoencoder_vq_f4.pth
    resshift convert weights.pth --to sinsr --preset sinsr-x4-s1 --first-stage vq-f4
    resshift convert RealESRGAN_x4plus.pth --to x4plus

The file is a released one of ResShift or SinSR, or of an architecture that spandrel reads; docs/models.md
says which are recognised. DIR then holds config.json and safetensors with the same tensors, and is a model
for every command and for `Upscaler.from_pretrained`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from resshift.command import Exit


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_argument("file", metavar="FILE", help="weight file: a path, s3:// or hf://OWNER/NAME/FILE")
    arguments.add_argument("--to", required=True, metavar="DIR", help="new or empty directory")
    arguments.add_argument("--preset", metavar="NAME", help="preset of the file, if its shapes fit several")
    arguments.add_argument("--first-stage", metavar="FILE", help="autoencoder (default: beside the file)")


def run(options: argparse.Namespace) -> Exit:
    """Convert, and print what the model is and its files."""
    from resshift.export import check_directory
    from resshift.models import locate_model

    directory = Path(options.to)
    check_directory(directory)
    found = locate_model(options.file, preset_name=options.preset, first_stage=options.first_stage)

    from resshift import weights
    from resshift.upscaler import load_networks

    load_networks(found)  # fails unless the weights fit
    copy = weights.copy_model(found, directory)
    print(f"{copy.name}: x{copy.config.scale}, {copy.config.steps} steps")
    for path in sorted(directory.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    return Exit.COMPLETE
