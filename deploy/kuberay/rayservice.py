"""Make a RayService of the cluster in raycluster.yaml and a Serve configuration, so that neither is kept
twice.

    python -m serve --host 0.0.0.0 --print-config > service.yaml        # and args.keys of the endpoint: docs/operate.md
    python deploy/kuberay/rayservice.py service.yaml | kubectl apply -n resshift -f -

The configuration is the file that `serve deploy` takes, with a host that probes reach (`serve/config.yaml`
listens on loopback). KubeRay applies it itself, and on a change of the cluster starts a second one beside the
first and moves traffic over when it is ready.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

_CLUSTER = Path(__file__).with_name("raycluster.yaml")


def rayservice(cluster: dict[str, Any], serve_config: str) -> dict[str, Any]:
    """Return the manifest.

    Args:
        cluster: a RayCluster manifest.
        serve_config: text of a Serve configuration.

    Raises:
        ValueError: Serve would not take the configuration (pydantic's ValidationError), or it listens where
            no probe comes.
    """
    config = ServeDeploySchema.model_validate(yaml.safe_load(serve_config))
    if config.http_options.host != "0.0.0.0":
        raise ValueError(
            f"http_options.host must be 0.0.0.0 in a pod, got {config.http_options.host}: set API keys, the "
            "port is for everybody"
        )
    return {
        "apiVersion": cluster["apiVersion"],
        "kind": "RayService",
        "metadata": {"name": cluster["metadata"]["name"]},
        # No readiness probe at workers: KubeRay adds one that asks the Serve proxy of the pod, and a probe of
        # ours would replace it.
        "spec": {"serveConfigV2": serve_config, "rayClusterConfig": cluster["spec"]},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the manifest to standard output; exit code 2 when the configuration cannot be one."""
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
