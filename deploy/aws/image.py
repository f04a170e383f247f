"""Bake the environment of requirements.lock into a machine image, so that nodes start with it instead of
installing it, and need no package index.

    python deploy/aws/image.py > image.yaml
    python deploy/overlay.py cluster.yaml image.yaml > mine.yaml

A machine of the image that cluster.yaml names runs node.sh at its first boot, stops when that has worked, is
copied, and is terminated, as it is when anything fails. It has no role and no key, and needs a subnet from
which a package index is reached. Nodes still run node.sh, which then finds its work done.

A builder without a GPU will do: the image has the driver, and nodes check it themselves. Make a new image
when requirements.lock changes; with an old one nodes install the difference. Region: AWS_REGION.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

_ROOT = Path(__file__).parents[2]
_FILES = {"node.sh": _ROOT / "deploy/aws/node.sh", "requirements.lock": _ROOT / "requirements.lock"}


def first_boot(index: str | None) -> str:
    """Return the script of the first boot: it writes the files, runs node.sh as the user of nodes, and stops
    the machine if that worked.
    """
    lines = ["#!/bin/bash", "set -e", "mkdir -p /home/ubuntu/resshift"]
    for name, path in _FILES.items():
        packed = base64.b64encode(gzip.compress(path.read_bytes())).decode()
        lines.append(f"echo {packed} | base64 -d | gunzip > /home/ubuntu/resshift/{name}")
    environment = f"PIP_INDEX_URL='{index}' UV_DEFAULT_INDEX='{index}' " if index else ""
    lines += [
        "chown -R ubuntu:ubuntu /home/ubuntu/resshift",
        f'su - ubuntu -c "{environment}bash resshift/node.sh environment"',
        "cloud-init clean --logs",
        "shutdown -h now",
    ]
    return "\n".join(lines) + "\n"


def build(
    ec2: Any, node: dict[str, Any], script: str, subnet: str | None, timeout_s: float, every_s: float
) -> str:
    """Start a builder, wait until it has stopped itself, and return the ID of an image of it.

    Args:
        ec2: Client of EC2.
        node: `node_config` of a node type: its image and its root disk.
        script: What the builder runs at its first boot.
        subnet: Where the builder runs; None for the default.
        timeout_s: How long that may take.
        every_s: Seconds between two questions.

    Raises:
        RuntimeError: The builder has not stopped in time: its set-up failed.
    """
    tags = [{"Key": "Name", "Value": "resshift-image-builder"}]
    started = ec2.run_instances(
        ImageId=node["ImageId"],
        InstanceType="c6i.2xlarge",
        BlockDeviceMappings=node["BlockDeviceMappings"],
        MetadataOptions=node["MetadataOptions"],
        InstanceInitiatedShutdownBehavior="stop",
        UserData=script,
        MinCount=1,
        MaxCount=1,
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        **({"SubnetId": subnet} if subnet else {}),
    )
    builder = started["Instances"][0]["InstanceId"]
    try:
        deadline = time.monotonic() + timeout_s
        while _state(ec2, builder) != "stopped":
            if time.monotonic() > deadline:
                said = ec2.get_console_output(InstanceId=builder).get("Output", "")[-2000:]
                raise RuntimeError(
                    f"the builder has not stopped within {timeout_s:g} s; its console:\n{said}"
                )
            time.sleep(every_s)
        name = f"resshift-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
        image = ec2.create_image(InstanceId=builder, Name=name)["ImageId"]
        ec2.get_waiter("image_available").wait(
            ImageIds=[image], WaiterConfig={"Delay": max(1, int(every_s)), "MaxAttempts": 240}
        )
    finally:
        ec2.terminate_instances(InstanceIds=[builder])
    return image


def _state(ec2: Any, instance: str) -> str:
    return ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]["State"]["Name"]


def main(argv: Sequence[str] | None = None) -> int:
    """Write an overlay that names the image to standard output; return 1 if it could not be made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cluster", type=Path, default=_ROOT / "cluster.yaml", help="cluster.yaml")
    parser.add_argument("--subnet", metavar="ID", help="subnet of the builder (the default one)")
    parser.add_argument("--index", metavar="URL", help="package index (PyPI)")
    parser.add_argument("--timeout-s", type=float, default=1800.0, help="how long set-up may take (1800)")
    parser.add_argument("--every-s", type=float, default=10.0, help="seconds between questions (10)")
    options = parser.parse_args(argv)
    types = yaml.safe_load(options.cluster.read_text())["available_node_types"]
    node = types["head"]["node_config"]
    try:
        image = build(
            boto3.client("ec2"),
            node,
            first_boot(options.index),
            options.subnet,
            options.timeout_s,
            options.every_s,
        )
    except (BotoCoreError, ClientError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    overlay = {"available_node_types": {name: {"node_config": {"ImageId": image}} for name in types}}
    yaml.safe_dump(overlay, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
