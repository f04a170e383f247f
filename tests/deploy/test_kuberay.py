"""The manifests for KubeRay, as far as they can be checked without a cluster and without its CRDs.

The names of fields are those of the Go types of KubeRay 1.5 and its validation; a field that is not listed here is refused, so a spelling
mistake is found. Pod templates are held against the Kubernetes schemas when `kubernetes-validate` is installed.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
Manifest = dict[str, Any]

CLUSTER_FIELDS = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"rayStartParams", "template", "serviceType", "labels", "resources"}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "labels", "resources"}
JOB_FIELDS = {"clusterSelector", "submitterConfig", "entrypoint", "runtimeEnvYAML", "submissionMode", "activeDeadlineSeconds"}


def manifest(name: str) -> Manifest:
    return yaml.safe_load((KUBERAY / name).read_text())


def render_service(serve_config: str) -> Manifest:
    return module().rayservice(manifest("raycluster.yaml"), serve_config)


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("resshift_rayservice", KUBERAY / "rayservice.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    yield "head", cluster["spec"]["headGroupSpec"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        yield group["groupName"], group


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Gi": 30, "Mi": 20}[unit]


def test_fields_are_those_of_kuberay() -> None:
    cluster = manifest("raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    assert set(cluster["spec"]) <= CLUSTER_FIELDS
    assert set(cluster["spec"]["autoscalerOptions"]) <= {"version", "idleTimeoutSeconds", "resources", "upscalingMode", "image"}
    for name, group in groups(cluster):
        assert set(group) <= (HEAD_FIELDS if name == "head" else GROUP_FIELDS), name
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), name  # map[string]string
    for name in ("rayjob-train.yaml", "rayjob-upscale.yaml"):
        job = manifest(name)
        assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
        assert set(job["spec"]) <= JOB_FIELDS


def test_the_cluster_runs_the_locked_ray_with_a_token() -> None:
    spec = manifest("raycluster.yaml")["spec"]
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1]
    assert spec["authOptions"] == {"mode": "token"}  # KubeRay refuses it without rayVersion >= 2.52
    assert spec["enableInTreeAutoscaling"] is True


def test_the_head_runs_no_work_and_groups_grow_from_nothing() -> None:
    cluster = manifest("raycluster.yaml")
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert 0 == group["minReplicas"] < group["maxReplicas"]


def test_the_head_promises_what_the_groups_add_up_to() -> None:
    """By these a job asks for GPUs that no pod has yet (pipelines/capacity.py)."""
    cluster = manifest("raycluster.yaml")
    sums = Counter[str]()
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        sums["max-cpus"] += group["maxReplicas"] * int(container["resources"]["requests"]["cpu"])
        sums["max-gpus"] += group["maxReplicas"] * int(container["resources"]["requests"].get("nvidia.com/gpu", 0))
    assert cluster["spec"]["headGroupSpec"]["labels"] == {name: str(number) for name, number in sums.items()}


def test_only_the_gpu_group_takes_gpus_and_tolerates_their_taint() -> None:
    for name, group in groups(manifest("raycluster.yaml")):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (name == "gpu")
        assert any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", [])) == has_gpu
        if has_gpu:  # extended resources are not overcommitted: request and limit must be equal
            assert container["resources"]["requests"]["nvidia.com/gpu"] == container["resources"]["limits"]["nvidia.com/gpu"]


def test_pods_are_unprivileged_probed_and_have_room_for_the_object_store() -> None:
    for name, group in groups(manifest("raycluster.yaml")):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert {"startupProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        shm = volumes[mounts["/dev/shm"]]
        assert shm["medium"] == "Memory"
        object_store = int(group["rayStartParams"]["object-store-memory"])
        assert object_store < bytes_of(shm["sizeLimit"]) < bytes_of(container["resources"]["limits"]["memory"]), name


def test_probes_ask_paths_that_ray_answers_without_the_token() -> None:
    import ray.dashboard.http_server_agent as agent
    import ray.dashboard.http_server_head as head

    public = {"head": Path(head.__file__).read_text(), "worker": Path(agent.__file__).read_text()}
    for name, group in groups(manifest("raycluster.yaml")):
        (container,) = group["template"]["spec"]["containers"]
        source = public["head" if name == "head" else "worker"]
        paths = {probe["httpGet"]["path"] for key, probe in container.items() if key.endswith("Probe")}
        assert paths
        assert all(f'"{path}"' in source for path in paths)


@pytest.mark.parametrize("name", ["rayjob-train.yaml", "rayjob-upscale.yaml"])
def test_entry_points_are_jobs_and_their_flags_exist(name: str) -> None:
    spec = manifest(name)["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": manifest("raycluster.yaml")["metadata"]["name"]}
    program, script, *arguments = shlex.split(spec["entrypoint"])
    assert program == "python"
    path = ROOT / Path(script).relative_to("/app")
    loaded = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location(path.stem, path))  # type: ignore[arg-type]
    assert found is not None
    assert found.loader is not None
    found.loader.exec_module(loaded)
    assert loaded.arguments().parse_args(arguments)
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)


SERVE_CONFIG = """\
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - {name: model, import_path: "some.module:application", args: {model: tiny-x4}}
"""


def test_a_service_is_the_cluster_and_the_serve_configuration() -> None:
    made = render_service(SERVE_CONFIG)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayService")
    assert set(made["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert made["spec"]["rayClusterConfig"] == manifest("raycluster.yaml")["spec"]
    assert yaml.safe_load(made["spec"]["serveConfigV2"])["applications"][0]["name"] == "model"
    for group in made["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert "readinessProbe" not in group["template"]["spec"]["containers"][0]  # KubeRay's own asks the Serve proxy


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SERVE_CONFIG.replace("0.0.0.0", "127.0.0.1"), "http_options.host must be 0.0.0.0"),
        (SERVE_CONFIG.replace("some.module:application", "nothing"), "import_path"),
        ("applications: [{name: a}]", "import_path"),
    ],
)
def test_a_configuration_that_serve_refuses_is_refused(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert module().main([str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_only_prometheus_the_operator_and_the_namespace_reach_the_pods() -> None:
    policy = manifest("networkpolicy.yaml")["spec"]
    assert policy["podSelector"]["matchLabels"] == {"ray.io/cluster": manifest("raycluster.yaml")["metadata"]["name"]}
    assert policy["policyTypes"] == ["Ingress"]
    assert all(rule.get("from") for rule in policy["ingress"])  # an empty list would be everybody
    assert {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])} == {8265, 8080}


def test_pod_templates_and_policy_against_the_schemas_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (100 MB of schemas)")
    for _, group in groups(manifest("raycluster.yaml")):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        validate.validate(pod, "1.31", strict=True)
    validate.validate(manifest("networkpolicy.yaml"), "1.31", strict=True)
