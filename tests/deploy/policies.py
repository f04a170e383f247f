"""Whether IAM policies allow a call: the rules of evaluation of AWS, as far as the policies here use them.

An explicit denial wins; otherwise one statement has to allow the action on the resource with all its
conditions. A condition holds for one of its values (OR), each key has to hold (AND), and a key that the call
does not have fails, except under ForAllValues. An operator that is not known here is an error, not a pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

AWS = Path(__file__).parents[2] / "deploy" / "aws"
ARN = "arn:aws:ec2:us-east-1:123456789012"


@dataclass(frozen=True, slots=True)
class Call:
    """One authorization that a request needs: an action on a resource, and the keys that conditions see."""

    action: str
    resource: str
    keys: Mapping[str, str | Sequence[str]] = field(default_factory=dict[str, str | Sequence[str]])


def statements(*names: str) -> list[dict[str, Any]]:
    """Return the statements of policies of deploy/aws by name, such as "head"."""
    return [
        one for name in names for one in json.loads((AWS / f"{name}-policy.json").read_text())["Statement"]
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matches(statement: Mapping[str, Any], call: Call) -> bool:
    return (
        any(fnmatchcase(call.action.lower(), one.lower()) for one in _listed(statement["Action"]))
        and any(fnmatchcase(call.resource, one) for one in _listed(statement["Resource"]))
        and all(
            _holds(operator, wanted, call.keys.get(key))
            for operator, pairs in statement.get("Condition", {}).items()
            for key, wanted in pairs.items()
        )
    )


def _holds(operator: str, wanted: Any, has: str | Sequence[str] | None) -> bool:
    values = _listed(wanted)
    if operator == "StringEquals":
        return isinstance(has, str) and has in values
    if operator == "ForAllValues:StringEquals":
        return all(one in values for one in (has or ()))
    raise ValueError(f"the operator {operator} is not evaluated here")


def allows(policy: Sequence[Mapping[str, Any]], call: Call) -> bool:
    """Return whether the statements together allow the call."""
    hits = [one["Effect"] for one in policy if _matches(one, call)]
    return "Deny" not in hits and "Allow" in hits


def calls_of(request: Mapping[str, str], tags_of: Mapping[str, Mapping[str, str]]) -> list[Call]:
    """Return what a request to the EC2 API needs, by the service authorization reference of AWS.

    Args:
        request: Form fields of the request.
        tags_of: Tags of the instances that there are.
    """
    action = f"ec2:{request['Action']}"
    instances = [value for name, value in request.items() if re.match(r"(InstanceId|ResourceId)\.\d+$", name)]
    owned: dict[str, dict[str, str | Sequence[str]]] = {
        one: {f"aws:ResourceTag/{key}": value for key, value in tags_of.get(one, {}).items()}
        for one in instances
    }
    if request["Action"] == "RunInstances":
        pairs = _tags(request, "TagSpecification.1.Tag")
        tagged = {f"aws:RequestTag/{key}": value for key, value in pairs.items()}
        launched: dict[str, str | Sequence[str]] = {
            **tagged,
            "ec2:MetadataHttpTokens": request.get("MetadataOptions.HttpTokens", "optional"),
        }
        parts = [
            "image/ami-1",
            "key-pair/k",
            "network-interface/*",
            "security-group/sg-1",
            "subnet/s-1",
            "volume/*",
        ]
        if "InstanceMarketOptions.MarketType" in request:
            parts.append("spot-instances-request/*")
        role = request["IamInstanceProfile.Name"]
        return [
            Call(action, f"{ARN}:instance/*", launched),
            *(Call(action, f"{_arn(part)}", {}) for part in parts),
            Call("ec2:CreateTags", f"{ARN}:instance/*", {**tagged, "ec2:CreateAction": "RunInstances"}),
            Call(
                "iam:PassRole",
                f"arn:aws:iam::123456789012:role/{role}",
                {"iam:PassedToService": "ec2.amazonaws.com"},
            ),
        ]
    if request["Action"] == "CreateTags":
        pairs = _tags(request, "Tag")
        asked: dict[str, str | Sequence[str]] = {
            f"aws:RequestTag/{key}": value for key, value in pairs.items()
        }
        return [
            Call(action, f"{ARN}:instance/{one}", {**owned[one], **asked, "aws:TagKeys": list(pairs)})
            for one in instances
        ]
    if request["Action"] == "TerminateInstances":
        return [Call(action, f"{ARN}:instance/{one}", owned[one]) for one in instances]
    if request["Action"] == "CreateKeyPair":
        return [Call(action, f"{ARN}:key-pair/{request['KeyName']}", {})]
    return [Call(action, "*", {})]


def _arn(part: str) -> str:
    return f"arn:aws:ec2:us-east-1::{part}" if part.startswith("image/") else f"{ARN}:{part}"


def _tags(request: Mapping[str, str], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    number = 1
    while (key := request.get(f"{prefix}.{number}.Key")) is not None:
        found[key] = request[f"{prefix}.{number}.Value"]
        number += 1
    return found
