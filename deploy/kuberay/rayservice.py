"""Make a RayService from the cluster in base/raycluster.yaml and a Serve configuration, so that neither is
duplicated.

    python -m serve --host 0.0.0.0 --print-config > service.yaml
    python deploy/kuberay/rayservice.py service.yaml > deploy/kuberay/overlays/service/rayservice.yaml
    kubectl apply -k deploy/kuberay/overlays/service

Before the second command add args.keys of the endpoint (docs/operate.md). The configuration is a file for
`serve deploy`, with a host that probes can reach (`serve/config.yaml` listens on loopback). KubeRay applies
it; when the cluster changes, KubeRay starts a second cluster beside the first and moves the traffic when it
is ready.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

_CLUSTER = Path(__file__).with_name("base") / "raycluster.yaml"


def rayservice(cluster: dict[str, Any], serve_config: str) -> dict[str, Any]:
    """Return the manifest.

    Args:
        cluster: RayCluster manifest.
        serve_config: Text of a Serve configuration.

    Raises:
        ValueError: The configuration is invalid (pydantic's ValidationError), or probes of workers cannot
            succeed with it: by its address, or for want of proxies.
    """
    config = ServeDeploySchema.model_validate(yaml.safe_load(serve_config))
    if config.proxy_location != "EveryNode":
        raise ValueError(
            f"proxy_location must be EveryNode, got {config.proxy_location.value}: pods of workers would "
            "never be ready"
        )
    if config.http_options.host != "0.0.0.0":
        raise ValueError(
            f"http_options.host must be 0.0.0.0 in a pod, got {config.http_options.host}; also set API keys, "
            "because everyone can reach the port"
        )
    return {
        "apiVersion": cluster["apiVersion"],
        "kind": "RayService",
        "metadata": {"name": cluster["metadata"]["name"]},
        # No readiness probe for workers: KubeRay adds one that queries the Serve proxy of the pod, and a
        # probe defined here would replace it. With proxy_location EveryNode there is a proxy wherever a
        # replica is: those pods become ready, and the others get no requests.
        "spec": {"serveConfigV2": serve_config, "rayClusterConfig": cluster["spec"]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the manifest to standard output; return 2 if the configuration is missing or invalid."""
    paths = list(sys.argv[1:] if argv is None else argv)
    if len(paths) != 1 or paths[0].startswith("-"):
        sys.stderr.write("usage: python deploy/kuberay/rayservice.py SERVE_CONFIG\n")
        return 2
    try:
        made = rayservice(yaml.safe_load(_CLUSTER.read_text()), Path(paths[0]).read_text())
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    yaml.safe_dump(made, sys.stdout, sort_keys=False, width=140)
    return 0


if __name__ == "__main__":
    sys.exit(main())
