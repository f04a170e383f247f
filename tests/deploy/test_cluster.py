"""cluster.yaml is what Ray accepts, fills in, plans with and launches from; EC2 is a server on loopback."""

# Ray's autoscaler is not typed.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "deploy" / "aws").glob("*.yaml"))
Cluster = dict[str, Any]


@pytest.fixture
def cluster() -> Cluster:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def laid_over(*overlays: Path) -> Cluster:
    """Return what `deploy/overlay.py` prints for cluster.yaml and these."""
    command = [
        sys.executable,
        str(ROOT / "deploy" / "overlay.py"),
        str(ROOT / "cluster.yaml"),
        *map(str, overlays),
    ]
    return yaml.safe_load(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def filled(cluster: Cluster) -> Cluster:
    """Return the configuration as `ray up` sees it: defaults filled in and validated."""
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it_with_defaults_filled_in(cluster: Cluster) -> None:
    assert set(filled(cluster)["available_node_types"]) == {"head", "gpu-spot", "gpu-on-demand", "cpu-spot"}


def _misspell(cluster: Cluster) -> None:
    cluster["max_worker"] = 3


def _half_a_cpu(cluster: Cluster) -> None:
    cluster["available_node_types"]["head"]["resources"] = {"CPU": 0.5}


def _no_such_head(cluster: Cluster) -> None:
    cluster["head_node_type"] = "master"


def _too_many(cluster: Cluster) -> None:
    cluster["available_node_types"]["gpu-spot"]["min_workers"] = 99


@pytest.mark.parametrize("mistake", [_misspell, _half_a_cpu, _no_such_head, _too_many])
def test_the_validation_has_teeth(mistake: Callable[[Cluster], None], cluster: Cluster) -> None:
    mistake(cluster)
    with pytest.raises((ValidationError, ValueError)):
        filled(cluster)


def test_there_are_overlays() -> None:
    assert {path.stem for path in OVERLAYS} == {"efa", "h100", "redis", "small", "vpc"}


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_ray_accepts_every_overlay_and_what_makes_the_cluster_safe_stays(overlay: Path) -> None:
    changed = laid_over(overlay)
    test_the_head_runs_no_work(changed)
    test_no_command_comes_from_the_defaults_of_ray(changed)
    test_dashboard_is_on_loopback_and_every_ray_asks_for_the_token(changed)
    test_every_node_has_a_profile_and_no_key(changed)
    assert changed != yaml.safe_load((ROOT / "cluster.yaml").read_text())


def test_overlays_can_be_laid_on_together() -> None:
    # efa names subnets of its own, so it takes the place of vpc.
    together = filled(laid_over(*(path for path in OVERLAYS if path.stem != "efa")))
    assert together["provider"]["use_internal_ips"] is True
    assert "availability_zone" not in together["provider"]
    assert together["available_node_types"]["gpu-on-demand"]["node_config"]["SubnetIds"]


def test_the_small_cluster_has_one_gpu() -> None:
    assert _launches(laid_over(ROOT / "deploy" / "aws" / "small.yaml"), {}, 5) == {"gpu-on-demand": 1}


def test_large_nodes_are_spot_first_too() -> None:
    changed = laid_over(ROOT / "deploy" / "aws" / "h100.yaml")
    assert _launches(changed, {}, 5) == {"gpu-spot": 4, "gpu-on-demand": 1}


def test_no_command_comes_from_the_defaults_of_ray(cluster: Cluster) -> None:
    """They install a nightly build and start the dashboard on every interface."""
    prepared = filled(cluster)
    commands = json.dumps([value for key, value in prepared.items() if key.endswith("_commands")])
    assert {key for key in prepared if key.endswith("_commands")} <= set(cluster)
    assert "s3-us-west-2.amazonaws.com" not in commands
    assert "0.0.0.0" not in commands
    assert "node.sh" in commands


def test_dashboard_is_on_loopback_and_every_ray_asks_for_the_token(cluster: Cluster) -> None:
    starts = [
        line
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for line in cluster[key]
        if "ray start" in line
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in " ".join(line.split()) for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda path: path.stem if path else "none")
def test_every_worker_watches_for_spot_notices(overlay: Path | None) -> None:
    """By the file that is copied to it, with the token; Ray starts first."""
    cluster: Cluster = laid_over(overlay) if overlay else yaml.safe_load((ROOT / "cluster.yaml").read_text())
    *_, start, watch = cluster["worker_start_ray_commands"]
    assert "ray start" in start
    words = watch.split()
    assert words[0] == "RAY_AUTH_MODE=token"
    assert words[-1] == "&", "ray up waits for a command that stays in front"
    assert words[words.index("nohup") + 1 : words.index(">>")] == [
        *("flock", "-n", "/tmp/resshift-notices.lock"),
        *("~/venv/bin/python", "~/resshift/notices.py"),
    ]
    assert "/dev/null" in words
    copied = cluster["file_mounts"]["/home/ubuntu/resshift/notices.py"]
    assert (ROOT / copied).is_file()


def test_the_head_runs_no_work(cluster: Cluster) -> None:
    head = filled(cluster)["available_node_types"]["head"]
    assert head["resources"]["CPU"] == 0
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]


def test_every_node_has_a_profile_and_no_key(cluster: Cluster) -> None:
    text = (ROOT / "cluster.yaml").read_text()
    assert "aws_access_key_id" not in text
    assert "AWS_SECRET" not in text
    for name, node in cluster["available_node_types"].items():
        wanted = "resshift-head" if name == "head" else "resshift-worker"
        assert node["node_config"]["IamInstanceProfile"] == {"Name": wanted}
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])


# vCPU and GPUs of the machines that the files name.
MACHINES = {
    "g6e.2xlarge": (8, 1),
    "c6i.8xlarge": (32, 0),
    "g4dn.xlarge": (4, 1),
    "c6i.2xlarge": (8, 0),
    "p5.48xlarge": (192, 8),
}


def _promised_and_possible(cluster: Cluster) -> tuple[Cluster, Cluster]:
    types = cluster["available_node_types"]
    workers = [
        (node["max_workers"], MACHINES[node["node_config"]["InstanceType"]])
        for name, node in types.items()
        if name != "head"
    ]
    labels = {name: value for name, value in types["head"]["labels"].items() if name.startswith("max-")}
    return labels, {
        f"max-{what}": str(sum(most * each[i] for most, each in workers))
        for i, what in enumerate(("cpus", "gpus"))
    }


def test_the_head_promises_what_the_workers_add_up_to(cluster: Cluster) -> None:
    """A driver knows the nodes that run. What the autoscaler may add, it reads from these labels
    (pipelines/cluster/capacity.py).
    """
    promised, possible = _promised_and_possible(cluster)
    assert promised == possible


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_so_does_the_head_of_every_overlay(overlay: Path) -> None:
    promised, possible = _promised_and_possible(laid_over(overlay))
    assert promised == possible


def _launches(cluster: Cluster, unavailable: dict[str, float], gpus: int) -> Counter[str]:
    """Ask Ray's scheduler which nodes it would launch for tasks of one GPU each."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    prepared = filled(cluster)
    for node in prepared["available_node_types"].values():  # what `ray up` reads from the instance types
        node["resources"] |= {"CPU": 8, "GPU": 1} if node["labels"]["role"] == "gpu" else {}
    config = AutoscalingConfig(prepared, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * gpus
        ),
        recoverable_resource_availabilities=unavailable,
    )
    return Counter(
        {
            launch.instance_type: launch.count
            for launch in ResourceDemandScheduler().schedule(request).to_launch
        }
    )


def test_gpus_are_spot_first_and_on_demand_when_spot_cannot_be_had(cluster: Cluster) -> None:
    assert _launches(cluster, {}, 3) == {"gpu-spot": 3}
    assert _launches(cluster, {"gpu-spot": 0.0}, 3) == {"gpu-on-demand": 3}
    assert _launches(cluster, {}, 50) == {"gpu-spot": 8, "gpu-on-demand": 4}  # the limits of both


def test_policies_allow_what_the_doctor_tries_and_no_more() -> None:
    worker = json.loads((ROOT / "deploy/aws/worker-policy.json").read_text())
    actions = {action for statement in worker["Statement"] for action in statement["Action"]}
    assert {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"} <= actions
    assert all(action.startswith("s3:") and "*" not in action for action in actions)
    head = json.loads((ROOT / "deploy/aws/head-policy.json").read_text())
    passed = [one["Resource"] for one in head["Statement"] if "iam:PassRole" in one["Action"]]
    assert passed == ["arn:aws:iam::*:role/resshift-worker"]


@pytest.fixture
def ec2(s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An AWS region with the two profiles, on loopback; HOME is elsewhere, because Ray writes its key pair
    into ~/.ssh.
    """
    import boto3

    monkeypatch.setenv("HOME", str(tmp_path))
    iam = boto3.client("iam")
    trust = (ROOT / "deploy/aws/trust-ec2.json").read_text()
    for name in ("resshift-head", "resshift-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    yield boto3.client("ec2")
    for name in ("resshift-head", "resshift-worker"):
        iam.remove_role_from_instance_profile(InstanceProfileName=name, RoleName=name)
        iam.delete_instance_profile(InstanceProfileName=name)
        iam.delete_role(RoleName=name)


@pytest.mark.slow
def test_nodes_launched_on_an_ec2_server_are_as_described(cluster: Cluster, ec2: Any) -> None:
    """`ray up` as far as it goes without machines: everything before SSH."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    for node in cluster["available_node_types"].values():
        node["node_config"]["ImageId"] = image  # moto does not resolve SSM parameters
    ready = _bootstrap_config(cluster, no_config_cache=True)
    assert ready["available_node_types"]["gpu-spot"]["resources"]["GPU"] == 1
    assert (
        ready["available_node_types"]["gpu-spot"]["resources"]
        == ready["available_node_types"]["gpu-on-demand"]["resources"]
    )

    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    for name, node in ready["available_node_types"].items():
        kind = "head" if name == "head" else "worker"
        tags = {
            TAG_RAY_NODE_KIND: kind,
            TAG_RAY_USER_NODE_TYPE: name,
            TAG_RAY_NODE_NAME: f"ray-resshift-{name}",
        }
        provider.create_node(copy.deepcopy(node["node_config"]), tags, 1)
    found = [
        one for reservation in ec2.describe_instances()["Reservations"] for one in reservation["Instances"]
    ]
    by_type = {
        tag["Value"]: one for one in found for tag in one["Tags"] if tag["Key"] == TAG_RAY_USER_NODE_TYPE
    }
    assert {name for name, one in by_type.items() if one.get("InstanceLifecycle") == "spot"} == {
        "gpu-spot",
        "cpu-spot",
    }
    for name, one in by_type.items():
        assert one["IamInstanceProfile"]["Arn"].endswith(
            "resshift-head" if name == "head" else "resshift-worker"
        )
        assert one["InstanceType"] == cluster["available_node_types"][name]["node_config"]["InstanceType"]
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert provider.non_terminated_nodes({}) == []
