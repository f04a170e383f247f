"""Make in an account of AWS what cluster.yaml expects, or bring it up to date: roles, the security group, the
role of spot machines.

    python deploy/aws/account.py --inputs my-photos --outputs my-results --ssh-from 192.0.2.0/24

It may run again at any time. The security group then has exactly two kinds of rules: all traffic within the
group, and SSH from the ranges that were named. Without any, it is closed: `ray up` then has to run in the
network itself (deploy/aws/vpc.yaml). Ray takes a group that has rules as it is, and would otherwise make one
with SSH open to everybody. The region is that of your environment (AWS_REGION).
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError

_HERE = Path(__file__).parent
GROUP = "resshift-ray"
ROLES = {"resshift-worker": ("worker",), "resshift-head": ("head", "worker")}
_SPOT = "spot.amazonaws.com"


def policy(name: str, inputs: str, outputs: str) -> str:
    """Return the text of a policy with the names of the buckets in it."""
    text = (_HERE / f"{name}-policy.json").read_text()
    return text.replace("YOUR-INPUTS", inputs).replace("YOUR-OUTPUTS", outputs)


def make_role(iam: Any, name: str, policies: dict[str, str]) -> None:
    """Make a role of EC2 with inline policies, and its instance profile, where they are missing."""
    if not _exists(iam.get_role, RoleName=name):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=(_HERE / "trust-ec2.json").read_text())
    for each, text in policies.items():
        iam.put_role_policy(RoleName=name, PolicyName=each, PolicyDocument=text)
    if not _exists(iam.get_instance_profile, InstanceProfileName=name):
        iam.create_instance_profile(InstanceProfileName=name)
    held = iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"]
    if not held:
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def make_spot_role(iam: Any) -> None:
    """Make the role by which EC2 runs spot machines: without it the first spot launch of an account fails."""
    try:
        iam.create_service_linked_role(AWSServiceName=_SPOT)
    except ClientError as error:
        # AWS says of a role that exists that the input is invalid; whoever may not ask sees that as well.
        if error.response["Error"]["Code"] not in {"InvalidInput", "EntityAlreadyExists"}:
            raise


def make_group(ec2: Any, vpc: str, ssh_from: Sequence[str]) -> str:
    """Make the security group, give it exactly the rules that it needs, and return its ID."""
    filters = [{"Name": "group-name", "Values": [GROUP]}, {"Name": "vpc-id", "Values": [vpc]}]
    found = ec2.describe_security_groups(Filters=filters)["SecurityGroups"]
    group = (
        found[0]["GroupId"]
        if found
        else ec2.create_security_group(GroupName=GROUP, Description="Nodes of ResShift", VpcId=vpc)["GroupId"]
    )
    wanted: list[dict[str, Any]] = [{"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}]
    if ssh_from:
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22}
        wanted.append(ssh | {"IpRanges": [{"CidrIp": one} for one in ssh_from]})
    held = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"][0]["IpPermissions"]
    if held:
        ec2.revoke_security_group_ingress(GroupId=group, IpPermissions=held)
    ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=wanted)
    return group


def _default_vpc(ec2: Any) -> str:
    found = ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]
    if not found:
        raise ValueError("this region has no default VPC: name one with --vpc")
    return found[0]["VpcId"]


def _exists(get: Any, **name: str) -> bool:
    try:
        get(**name)
    except ClientError as error:
        if error.response["Error"]["Code"] == "NoSuchEntity":
            return False
        raise
    return True


def arguments() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--inputs", required=True, metavar="BUCKET", help="bucket that nodes read")
    parser.add_argument("--outputs", required=True, metavar="BUCKET", help="bucket that nodes write")
    parser.add_argument(
        "--ssh-from", action="append", default=[], metavar="CIDR", help="may reach port 22; may be repeated"
    )
    parser.add_argument("--vpc", metavar="ID", help="network of the group (the default one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 2 for wrong options, 1 when AWS refuses."""
    options = arguments().parse_args(argv)
    try:
        for each in options.ssh_from:
            if ipaddress.ip_network(each).prefixlen == 0:
                raise ValueError(f"--ssh-from must not be everybody, got {each}")
        iam, ec2 = boto3.client("iam"), boto3.client("ec2")
        for name, names in ROLES.items():
            make_role(iam, name, {each: policy(each, options.inputs, options.outputs) for each in names})
        make_spot_role(iam)
        group = make_group(ec2, options.vpc or _default_vpc(ec2), options.ssh_from)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except (BotoCoreError, ClientError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"roles": list(ROLES), "security_group": group}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
