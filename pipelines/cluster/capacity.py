"""What a cluster can compute with: the nodes that run, and those that its autoscaler would start for the
asking.

Ray 2.60 tells a driver of nodes that run and of no others: the cluster configuration that its state API would
return is never written by the open-source autoscaler. The first job on a cluster that has scaled to nothing
would see no GPU and no CPU. So a cluster that grows says on labels of a node what it grows to, usually of the
head, which is always there: `labels: { max-cpus: "480", max-gpus: "12" }` in cluster.yaml and deploy/kuberay.
Without the labels, what runs is what there is.
"""

from __future__ import annotations

import ray

_LABELS = {"CPU": "max-cpus", "GPU": "max-gpus"}


def promised() -> dict[str, float]:
    """Return the CPUs and GPUs that labels promise; names without a label are left out.

    Raises:
        ValueError: A label is not a whole number.
    """
    found: dict[str, float] = {}
    for node in ray.nodes():
        labels: dict[str, str] = node.get("Labels") or {}
        for name, label in _LABELS.items():
            if not node["Alive"] or label not in labels:
                continue
            if not labels[label].isdecimal():
                raise ValueError(
                    f"label {label} of node {node['NodeID'][:8]} must be a whole number, got "
                    f"{labels[label]!r}"
                )
            found[name] = max(found.get(name, 0.0), float(labels[label]))
    return found


def reachable() -> dict[str, float]:
    """Return the logical resources of the connected cluster by name: of its nodes, or what is promised where
    that is more.

    Raises:
        ValueError: As `promised`.
    """
    resources: dict[str, float] = dict(ray.cluster_resources())
    return resources | {name: max(resources.get(name, 0.0), number) for name, number in promised().items()}


def has_gpus() -> bool:
    """Return whether a task that asks for a GPU would get one, now or when a node has started."""
    return reachable().get("GPU", 0.0) >= 1
