"""The account of AWS: what the policies allow and deny, what account.py and image.py make, and `ray up`
itself against an EC2 API on loopback, with programs in the place of ssh and rsync.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import servers
from tests.deploy.policies import ARN, Call, allows, calls_of, statements
from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
MINE = {"ray-cluster-name": "resshift", "ray-node-type": "worker"}
HEAD = statements("head", "worker")
OF_THIS = {"aws:ResourceTag/ray-cluster-name": "resshift"}
OF_ANOTHER = {"aws:ResourceTag/ray-cluster-name": "payroll"}
NODE = f"{ARN}:instance/i-1"
ANY = f"{ARN}:instance/*"
ROLE = "arn:aws:iam::123456789012:role"
TO_EC2 = {"iam:PassedToService": "ec2.amazonaws.com"}
AT_LAUNCH = {"ec2:CreateAction": "RunInstances", "aws:RequestTag/ray-cluster-name": "resshift"}
LAUNCHED = {"aws:RequestTag/ray-cluster-name": "resshift", "ec2:MetadataHttpTokens": "required"}


@pytest.mark.parametrize(
    "call",
    [
        Call("ec2:DescribeInstances", "*"),
        Call("ec2:RunInstances", ANY, LAUNCHED),
        Call("ec2:CreateTags", ANY, AT_LAUNCH),
        Call("ec2:CreateTags", NODE, {**OF_THIS, "aws:TagKeys": ["ray-node-status"]}),
        Call("ec2:TerminateInstances", NODE, OF_THIS),
        Call("iam:PassRole", f"{ROLE}/resshift-worker", TO_EC2),
        Call("s3:PutObject", "arn:aws:s3:::YOUR-OUTPUTS/x.png"),
    ],
)
def test_the_head_may(call: Call) -> None:
    assert allows(HEAD, call)


@pytest.mark.parametrize(
    "call",
    [
        # Scale's finding: it could tag any machine of the account as its own, and then end it.
        Call(
            "ec2:CreateTags",
            NODE,
            {"aws:RequestTag/ray-cluster-name": "resshift", "aws:TagKeys": ["ray-cluster-name"]},
        ),
        Call("ec2:CreateTags", NODE, {**OF_ANOTHER, "aws:TagKeys": ["ray-node-status"]}),
        Call("ec2:CreateTags", NODE, {**OF_THIS, "aws:TagKeys": ["ray-node-status", "ray-cluster-name"]}),
        Call(
            "ec2:CreateTags",
            NODE,
            {"ec2:CreateAction": "CreateVolume", "aws:RequestTag/ray-cluster-name": "resshift"},
        ),
        Call("ec2:TerminateInstances", NODE, OF_ANOTHER),
        Call("ec2:TerminateInstances", NODE),
        Call("ec2:StopInstances", NODE, OF_THIS),
        Call("ec2:RunInstances", ANY, {"ec2:MetadataHttpTokens": "required"}),
        Call("ec2:RunInstances", ANY, {**LAUNCHED, "ec2:MetadataHttpTokens": "optional"}),
        Call("ec2:RunInstances", ANY, {**LAUNCHED, "aws:RequestTag/ray-cluster-name": "payroll"}),
        Call("iam:PassRole", f"{ROLE}/resshift-head", TO_EC2),
        Call("iam:PassRole", f"{ROLE}/admin", TO_EC2),
        Call("iam:PassRole", f"{ROLE}/resshift-worker", {"iam:PassedToService": "lambda.amazonaws.com"}),
        Call("ec2:CreateSecurityGroup", f"{ARN}:security-group/*"),
        Call("ec2:AuthorizeSecurityGroupIngress", f"{ARN}:security-group/sg-1"),
        Call(
            "iam:CreateServiceLinkedRole",
            f"{ROLE}/aws-service-role/spot.amazonaws.com/AWSServiceRoleForEC2Spot",
        ),
    ],
)
def test_the_head_may_not(call: Call) -> None:
    assert not allows(HEAD, call)


def test_workers_have_the_buckets_and_nothing_else() -> None:
    worker = statements("worker")
    assert allows(worker, Call("s3:GetObject", "arn:aws:s3:::YOUR-INPUTS/x.png"))
    assert not allows(worker, Call("s3:PutObject", "arn:aws:s3:::YOUR-INPUTS/x.png"))
    assert not allows(worker, Call("s3:GetObject", "arn:aws:s3:::payroll/x.csv"))
    assert not allows(worker, Call("ec2:DescribeInstances", "*"))


def test_a_condition_that_is_not_understood_is_an_error() -> None:
    odd = [{"Effect": "Allow", "Action": "a:B", "Resource": "*", "Condition": {"ArnLike": {"k": "v"}}}]
    with pytest.raises(ValueError, match="ArnLike"):
        allows(odd, Call("a:B", "*"))


def test_every_cluster_of_an_overlay_is_one_of_the_policies() -> None:
    names = {"resshift"}
    for path in (ROOT / "deploy/aws").glob("*.yaml"):
        names.add(yaml.safe_load(path.read_text()).get("cluster_name", "resshift"))
    for name in names:
        assert allows(HEAD, Call("ec2:TerminateInstances", NODE, {"aws:ResourceTag/ray-cluster-name": name}))


def test_nodes_with_efa_have_a_placement_group_and_one_interface_for_each_card() -> None:
    merged: Any = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for name in ("h100", "efa"):
        merged = load_script("deploy/overlay.py").merge(
            merged, yaml.safe_load((ROOT / f"deploy/aws/{name}.yaml").read_text())
        )
    assert merged["provider"]["use_internal_ips"] is True
    for name in ("gpu-spot", "gpu-on-demand"):
        node = merged["available_node_types"][name]["node_config"]
        assert node["InstanceType"] == "p5.48xlarge"
        assert node["Placement"] == {"GroupName": "resshift"}
        cards = node["NetworkInterfaces"]
        assert [one["NetworkCardIndex"] for one in cards] == list(range(32))
        assert [one["DeviceIndex"] for one in cards] == [0] + [1] * 31
        assert [one["InterfaceType"] for one in cards] == ["efa"] + ["efa-only"] * 31
        # Ray takes subnets and groups from the interfaces, and refuses them beside these.
        assert all(one["SubnetId"] and one["Groups"] for one in cards)
        assert not {"SubnetIds", "SecurityGroupIds"} & set(node)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An account of its own, which writes down what it is asked; `boto3` in this process reaches it."""
    folder = tmp_path_factory.mktemp("aws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOTO_RECORDER_FILEPATH", str(folder / "recording"))
        with (
            servers.moto(folder / "moto.log") as port,
            servers.using_store(f"http://127.0.0.1:{port}") as environment,
        ):
            yield environment


def _recording(cloud: dict[str, str], verb: str) -> bytes:
    method = "GET" if verb == "download" else "POST"
    request = urllib.request.Request(
        f"{cloud['AWS_ENDPOINT_URL']}/moto-api/recorder/{verb}-recording", method=method
    )
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def _asked(cloud: dict[str, str]) -> list[dict[str, str]]:
    """Return the requests to the EC2 API since the recording began, as form fields."""
    found: list[dict[str, str]] = []
    for line in _recording(cloud, "download").splitlines():
        entry = json.loads(line)
        body = base64.b64decode(entry["body"]).decode() if entry["body_encoded"] else entry["body"]
        fields = dict(urllib.parse.parse_qsl(body or ""))
        if "/ec2/" in json.dumps(entry["headers"]) and "Action" in fields:
            found.append(fields)
    return found


def _account(*arguments: str) -> int:
    return load_script("deploy/aws/account.py").main(
        ["--inputs", "my-photos", "--outputs", "my-results", *arguments]
    )


def _rules(ec2: Any) -> list[tuple[str, list[str]]]:
    (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["resshift-ray"]}])[
        "SecurityGroups"
    ]
    return sorted(
        (one["IpProtocol"], [each["CidrIp"] for each in one["IpRanges"]]) for one in group["IpPermissions"]
    )


@pytest.mark.slow
def test_an_account_is_made_and_brought_up_to_date(cloud: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import boto3

    iam, ec2 = boto3.client("iam"), boto3.client("ec2")
    assert _account() == 0
    assert _rules(ec2) == [("-1", [])]  # closed
    ec2.authorize_security_group_ingress(
        GroupId=json.loads(capsys.readouterr().out)["security_group"],
        IpPermissions=[
            {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535, "IpRanges": [{"CidrIp": "0.0.0.0/0"}]}
        ],
    )
    assert _account("--ssh-from", "192.0.2.0/24") == 0
    assert _rules(ec2) == [("-1", []), ("tcp", ["192.0.2.0/24"])]  # what was opened is closed again
    for name, policies in (("resshift-head", ["head", "worker"]), ("resshift-worker", ["worker"])):
        assert iam.list_role_policies(RoleName=name)["PolicyNames"] == policies
        (role,) = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
        assert role["RoleName"] == name
    text = json.dumps(iam.get_role_policy(RoleName="resshift-worker", PolicyName="worker")["PolicyDocument"])
    assert "YOUR" not in text
    assert "arn:aws:s3:::my-photos/*" in text
    assert len(iam.list_roles(PathPrefix="/aws-service-role/spot.amazonaws.com/")["Roles"]) == 1


@pytest.mark.parametrize("everybody", ["0.0.0.0/0", "::/0", "my house"])
def test_ssh_is_not_opened_to_everybody(everybody: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _account("--ssh-from", everybody) == 2
    assert everybody in capsys.readouterr().err


PROGRAM = """\
#!/bin/bash
echo "${{*//$'\\n'/ }}" >> {log}
"""


@pytest.fixture
def machine(cloud: Any, tmp_path: Path) -> dict[str, str]:
    """Variables of somebody's machine from which `ray up` runs: its ssh and rsync only write down what they
    are asked, and succeed.
    """
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("ssh", "rsync", "scp"):
        tool = tools / name
        tool.write_text(PROGRAM.format(log=tmp_path / "said.txt"))
        tool.chmod(0o755)
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    return os.environ | cloud | {"HOME": str(tmp_path), "PATH": f"{tools}:{os.environ['PATH']}"}


def _ray(machine: dict[str, str], *arguments: str) -> str:
    command = [str(Path(sys.executable).with_name("ray")), *arguments]
    done = subprocess.run(
        command, env=machine, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _tags(ec2: Any) -> dict[str, dict[str, str]]:
    return {
        one["InstanceId"]: {tag["Key"]: tag["Value"] for tag in one.get("Tags", [])}
        for reservation in ec2.describe_instances()["Reservations"]
        for one in reservation["Instances"]
    }


def _states(ec2: Any) -> dict[str, str]:
    found = ec2.describe_instances()["Reservations"]
    return {one["InstanceId"]: one["State"]["Name"] for each in found for one in each["Instances"]}


@pytest.mark.slow
def test_ray_up_and_down_need_no_more_than_the_policies_and_end_only_their_own(
    cloud: Any, machine: dict[str, str], tmp_path: Path
) -> None:
    """The commands themselves, up to what a machine would do at the other end of ssh."""
    import boto3

    assert _account("--ssh-from", "192.0.2.0/24") == 0
    ec2 = boto3.client("ec2")
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    strangers = [
        ec2.run_instances(
            ImageId=image,
            MinCount=1,
            MaxCount=1,
            TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
        )["Instances"][0]["InstanceId"]
        for tags in (
            [{"Key": "ray-cluster-name", "Value": "payroll"}],
            [{"Key": "Name", "Value": "database"}],
        )
    ]
    made = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    for node in made["available_node_types"].values():
        node["node_config"]["ImageId"] = image  # moto resolves no parameters of SSM
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(made))
    _recording(cloud, "start")

    _ray(machine, "up", "--yes", "--no-config-cache", str(path))

    tags = _tags(ec2)
    (head,) = [one for one, has in tags.items() if has.get("ray-cluster-name") == "resshift"]
    assert tags[head]["ray-node-type"] == "head"
    assert tags[head]["ray-node-status"] == "up-to-date"
    said = (tmp_path / "said.txt").read_text()
    assert said.index("bash ~/resshift/node.sh") < said.index("ray start --head")
    assert "deploy/aws/node.sh" in said  # copied before it is run
    assert _rules(ec2) == [("-1", []), ("tcp", ["192.0.2.0/24"])]  # Ray leaves the group as it is

    _ray(machine, "down", "--yes", str(path))

    states = _states(ec2)
    assert states[head] in {"shutting-down", "terminated"}
    assert {states[one] for one in strangers} == {"running"}
    launcher = statements("head", "launcher")
    needed = [call for request in _asked(cloud) for call in calls_of(request, tags)]
    assert {
        "ec2:RunInstances",
        "ec2:CreateTags",
        "ec2:TerminateInstances",
        "ec2:CreateKeyPair",
        "iam:PassRole",
    } <= {call.action for call in needed}
    assert [call for call in needed if not allows(launcher, call)] == []


@pytest.mark.slow
def test_an_image_is_made_of_a_machine_that_stopped_itself_and_is_then_ended(
    cloud: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """moto runs no machine: the test stops it in its place."""
    import boto3

    ec2 = boto3.client("ec2")
    made = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    made["available_node_types"]["head"]["node_config"]["ImageId"] = ec2.describe_images(Owners=["amazon"])[
        "Images"
    ][0]["ImageId"]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(made))
    image = load_script("deploy/aws/image.py")
    before = set(_states(ec2))
    assert image.main(["--cluster", str(path), "--timeout-s", "0", "--every-s", "0"]) == 1
    assert "has not stopped" in capsys.readouterr().err

    class Machine:
        """EC2, whose machines stop as soon as somebody looks at them."""

        def __getattr__(self, name: str) -> Any:
            return getattr(ec2, name)

        def describe_instances(self, **options: Any) -> Any:
            ec2.stop_instances(InstanceIds=options["InstanceIds"])
            return ec2.describe_instances(**options)

    node = made["available_node_types"]["head"]["node_config"]
    found = image.build(Machine(), node, image.first_boot(None), None, 60, 0.01)
    assert ec2.describe_images(ImageIds=[found])["Images"][0]["State"] == "available"
    after = {one: state for one, state in _states(ec2).items() if one not in before}
    assert set(after.values()) <= {"shutting-down", "terminated"}
    assert len(after) == 2


def test_the_first_boot_of_an_image_fits_into_what_ec2_takes_and_writes_the_files() -> None:
    script = load_script("deploy/aws/image.py").first_boot("https://index.example/simple")
    assert len(script) < 16_384
    assert script.startswith("#!/bin/bash\nset -e\n")  # otherwise a failed set-up would stop the machine, too
    assert "PIP_INDEX_URL='https://index.example/simple'" in script
    assert script.index("node.sh environment") < script.index("shutdown")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
