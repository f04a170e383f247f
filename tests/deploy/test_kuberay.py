"""The manifests for KubeRay, as far as they can be checked without a cluster.

kuberay-crds.yaml says what the CRDs of KubeRay 1.5 demand outside pod specs; the manifests are validated
against it with strict fields, so a spelling mistake is found. What the operator alone checks is not in a CRD
and not here. Pod templates are held against the Kubernetes schemas when `kubernetes-validate` is installed.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.scripts import load_script

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "deploy" / "kuberay"
Manifest = dict[str, Any]

JOBS = sorted(path.name for path in KUBERAY.glob("rayjob*.yaml"))
CRDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("kuberay-crds.yaml").read_text())


def manifest(name: str) -> Manifest:
    path = KUBERAY / "base" / name
    return yaml.safe_load((path if path.exists() else KUBERAY / name).read_text())


def render_service(serve_config: str) -> Manifest:
    return load_script("deploy/kuberay/rayservice.py").rayservice(manifest("raycluster.yaml"), serve_config)


def rendered_service() -> Manifest:
    """Of the configuration in the repository, which listens on this machine alone until somebody says
    otherwise.
    """
    return render_service(
        (ROOT / "serve" / "config.yaml").read_text().replace("host: 127.0.0.1", "host: 0.0.0.0")
    )


def refusals(made: Manifest, kind: str = "") -> list[str]:
    schema = {**CRDS, "$ref": f"#/$defs/{kind or made['kind']}"}
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(made)]


def changed(made: Manifest, path: tuple[str | int, ...], value: object) -> Manifest:
    """Return a copy with another value at a path; with ... there is nothing any more."""
    copy = deepcopy(made)
    *parents, last = path
    place: Any = copy
    for step in parents:
        place = place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return copy


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    yield "head", cluster["spec"]["headGroupSpec"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        yield group["groupName"], group


def bytes_of(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) << {"Gi": 30, "Mi": 20}[unit]


def subschemas(schema: object) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for child in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from subschemas(child)


def test_every_object_in_the_schema_is_closed_or_open_on_purpose() -> None:
    Draft202012Validator.check_schema(CRDS)
    objects = [schema for schema in subschemas(CRDS) if schema.get("type") == "object"]
    assert objects
    for schema in objects:
        assert ("additionalProperties" in schema) != bool(
            schema.get("x-kubernetes-preserve-unknown-fields")
        ), schema
    references = {schema["$ref"] for schema in subschemas(CRDS) if "$ref" in schema}
    assert {reference.split("/")[2] for reference in references} <= set(CRDS["$defs"])


@pytest.mark.parametrize("name", ["raycluster.yaml", *JOBS])
def test_manifests_are_what_the_crds_take(name: str) -> None:
    made = manifest(name)
    assert made["kind"] == ("RayCluster" if name == "raycluster.yaml" else "RayJob")
    assert refusals(made) == []


def test_the_rendered_service_is_what_the_crd_takes() -> None:
    made = rendered_service()
    assert made["kind"] == "RayService"
    assert refusals(made) == []


HEAD = ("spec", "headGroupSpec")
GPU = ("spec", "workerGroupSpecs", 0)
UPGRADE = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {"stepSizePercent": 10, "intervalSeconds": 5},
}
RULE = {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}}
KEEP = {"policy": "DeleteNone"}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # Misspelt, or of another version.
        (("spek",), {}, "'spek' was unexpected"),
        (("spec", "authOption"), {}, "'authOption' was unexpected"),
        (("spec", "autoscalerOptions", "idleTimeout"), 600, "'idleTimeout' was unexpected"),
        ((*HEAD, "rayStartParam"), {}, "'rayStartParam' was unexpected"),
        ((*HEAD, "template", "specs"), {}, "'specs' was unexpected"),
        ((*GPU, "minReplica"), 0, "'minReplica' was unexpected"),
        ((*GPU, "scaleStrategy"), {"workerToDelete": []}, "'workerToDelete' was unexpected"),
        (("spec", "upgradeStrategy"), {"type": "Recreate"}, "'upgradeStrategy' was unexpected"),
        (("apiVersion",), "ray.io/v1alpha1", "'ray.io/v1' was expected"),
        # Of another type.
        (("spec", "rayVersion"), 2.6, "2.6 is not of type 'string'"),
        (("spec", "enableInTreeAutoscaling"), "true", "'true' is not of type 'boolean'"),
        (("spec", "autoscalerOptions", "idleTimeoutSeconds"), "600", "'600' is not of type 'integer'"),
        (("spec", "autoscalerOptions", "resources", "limits", "memory"), "1 GiB", "'1 GiB' does not match"),
        (("spec", "autoscalerOptions", "resources", "requests", "cpu"), 0.5, "0.5 is not valid under any"),
        ((*HEAD, "rayStartParams", "num-cpus"), 0, "0 is not of type 'string'"),
        ((*HEAD, "labels", "max-gpus"), 8, "8 is not of type 'string'"),
        (("spec", "workerGroupSpecs"), {}, "{} is not of type 'array'"),
        ((*GPU, "maxReplicas"), 1 << 31, "2147483648 is greater than the maximum"),
        # Missing.
        (("kind",), "RayService", "'rayClusterConfig' is a required property"),
        (("metadata",), ..., "'metadata' is a required property"),
        (("metadata",), {}, "'name' is a required property"),
        (HEAD, ..., "'headGroupSpec' is a required property"),
        ((*HEAD, "template"), ..., "'template' is a required property"),
        ((*GPU, "groupName"), ..., "'groupName' is a required property"),
        ((*GPU, "minReplicas"), ..., "'minReplicas' is a required property"),
        ((*GPU, "template", "spec", "containers"), ..., "'containers' is a required property"),
        (("spec", "gcsFaultToleranceOptions"), {}, "'redisAddress' is a required property"),
        # Not one of the values.
        (("spec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("spec", "autoscalerOptions", "version"), 2, "2 is not one of"),
        (("spec", "autoscalerOptions", "upscalingMode"), "aggressive", "'aggressive' is not one of"),
        (("spec", "managedBy"), "argo", "'argo' is not one of"),
    ],
)
def test_a_mistake_in_a_cluster_is_refused(path: tuple[str | int, ...], value: object, message: str) -> None:
    assert any(message in refusal for refusal in refusals(changed(manifest("raycluster.yaml"), path, value)))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "entryPoint"), "python", "'entryPoint' was unexpected"),
        (("spec", "submitterConfig", "backOffLimit"), 2, "'backOffLimit' was unexpected"),
        (("spec", "submitterConfig", "backoffLimit"), "2", "'2' is not of type 'integer'"),
        (("spec", "runtimeEnvYAML"), {"env_vars": {}}, "is not of type 'string'"),
        (("spec", "clusterSelector"), ["resshift"], "is not of type 'object'"),
        (("spec", "rayClusterSpec"), {}, "'headGroupSpec' is a required property"),
        (("spec", "submitterPodTemplate"), {"spec": {}}, "'containers' is a required property"),
        (("spec", "deletionStrategy"), {}, "$.spec.deletionStrategy"),
        (("spec", "deletionStrategy"), {"onSuccess": KEEP}, "$.spec.deletionStrategy"),
        (
            ("spec", "deletionStrategy"),
            {"onSuccess": KEEP, "onFailure": KEEP, "deletionRules": [RULE]},
            "$.spec.deletionStrategy",
        ),
        (("spec", "deletionStrategy"), {"deletionRules": []}, "[] should be non-empty"),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{**RULE, "policy": "Delete"}]},
            "'Delete' is not one of",
        ),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{"condition": RULE["condition"]}]},
            "'policy' is a required property",
        ),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{**RULE, "condition": {}}]},
            "'jobStatus' is a required property",
        ),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{**RULE, "condition": {"jobStatus": "DONE"}}]},
            "'DONE' is not one of",
        ),
        (
            ("spec", "deletionStrategy"),
            {"deletionRules": [{**RULE, "condition": {"jobStatus": "FAILED", "ttlSeconds": -1}}]},
            "-1 is less than the minimum of 0",
        ),
    ],
)
@pytest.mark.parametrize("name", JOBS)
def test_a_mistake_in_a_job_is_refused(
    name: str, path: tuple[str | int, ...], value: object, message: str
) -> None:
    assert any(message in refusal for refusal in refusals(changed(manifest(name), path, value)))


@pytest.mark.parametrize("strategy", [{"deletionRules": [RULE]}, {"onSuccess": KEEP, "onFailure": KEEP}])
def test_a_job_may_say_what_is_deleted_in_either_way(strategy: Manifest) -> None:
    assert refusals(changed(manifest(JOBS[0]), ("spec", "deletionStrategy"), strategy)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "serveConfig"), "", "'serveConfig' was unexpected"),
        (("spec", "serveConfigV2"), {"applications": []}, "is not of type 'string'"),
        (("spec", "rayClusterConfig"), ..., "'rayClusterConfig' is a required property"),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 1, "replica"), 1, "'replica' was unexpected"),
        (("spec", "rayClusterDeletionDelaySeconds"), -1, "-1 is less than the minimum of 0"),
        (("spec", "upgradeStrategy"), UPGRADE, "'gatewayClassName' is a required property"),
    ],
)
def test_a_mistake_in_a_service_is_refused(path: tuple[str | int, ...], value: object, message: str) -> None:
    assert any(message in refusal for refusal in refusals(changed(rendered_service(), path, value)))


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
    """By these a job asks for GPUs that no pod has yet (pipelines/cluster/capacity.py)."""
    cluster = manifest("raycluster.yaml")
    sums = Counter[str]()
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        sums["max-cpus"] += group["maxReplicas"] * int(container["resources"]["requests"]["cpu"])
        sums["max-gpus"] += group["maxReplicas"] * int(
            container["resources"]["requests"].get("nvidia.com/gpu", 0)
        )
    assert cluster["spec"]["headGroupSpec"]["labels"] == {name: str(number) for name, number in sums.items()}


def test_only_the_gpu_group_takes_gpus_and_tolerates_their_taint() -> None:
    for name, group in groups(manifest("raycluster.yaml")):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        assert has_gpu == (name == "gpu")
        assert any(one["key"] == "nvidia.com/gpu" for one in pod.get("tolerations", [])) == has_gpu
        if has_gpu:  # extended resources are not overcommitted: request and limit must be equal
            assert (
                container["resources"]["requests"]["nvidia.com/gpu"]
                == container["resources"]["limits"]["nvidia.com/gpu"]
            )


def test_pods_are_unprivileged_probed_and_have_room_for_the_object_store() -> None:
    for name, group in groups(manifest("raycluster.yaml")):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"startupProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        shm = volumes[mounts["/dev/shm"]]
        assert shm["medium"] == "Memory"
        object_store = int(group["rayStartParams"]["object-store-memory"])
        assert (
            object_store < bytes_of(shm["sizeLimit"]) < bytes_of(container["resources"]["limits"]["memory"])
        ), name


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


@pytest.mark.parametrize("name", JOBS)
def test_entry_points_are_jobs_and_their_flags_exist(name: str) -> None:
    spec = manifest(name)["spec"]
    assert spec["clusterSelector"] == {"ray.io/cluster": manifest("raycluster.yaml")["metadata"]["name"]}
    program, script, *arguments = shlex.split(spec["entrypoint"])
    assert program == "python"
    job = load_script(str(Path(script).relative_to("/app")))
    assert job.arguments().parse_args(arguments)
    assert isinstance(yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"], dict)


SERVE_CONFIG = """\
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
applications:
  - {name: model, import_path: "some.module:application", args: {model: tiny-x4}}
"""


def test_a_service_is_the_cluster_and_the_serve_configuration() -> None:
    made = render_service(SERVE_CONFIG)
    assert set(made["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert made["spec"]["rayClusterConfig"] == manifest("raycluster.yaml")["spec"]
    assert yaml.safe_load(made["spec"]["serveConfigV2"])["applications"][0]["name"] == "model"
    for group in made["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert (
            "readinessProbe" not in group["template"]["spec"]["containers"][0]
        )  # KubeRay's own asks the Serve proxy


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SERVE_CONFIG.replace("0.0.0.0", "127.0.0.1"), "http_options.host must be 0.0.0.0"),
        (SERVE_CONFIG.replace("EveryNode", "HeadOnly"), "proxy_location must be EveryNode, got HeadOnly"),
        (SERVE_CONFIG.replace("some.module:application", "nothing"), "import_path"),
        ("applications: [{name: a}]", "import_path"),
    ],
)
def test_a_configuration_that_serve_refuses_is_refused(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert load_script("deploy/kuberay/rayservice.py").main([str(tmp_path / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_only_prometheus_the_operator_and_the_namespace_reach_the_pods() -> None:
    policy = manifest("networkpolicy.yaml")["spec"]
    selected = policy["podSelector"]["matchLabels"]
    # Not the name of the cluster: that of a RayService is generated.
    groups = manifest("raycluster.yaml")["spec"]
    for group in (groups["headGroupSpec"], *groups["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == selected
    assert policy["policyTypes"] == ["Ingress"]
    open_to_all = [rule["ports"] for rule in policy["ingress"] if not rule.get("from")]
    assert open_to_all == [[{"port": 8000}]]  # the endpoint has keys
    ports = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", [])}
    assert ports == {8265, 8080, 8000}


def test_pod_templates_and_policy_against_the_schemas_of_kubernetes() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed (100 MB of schemas)"
    )
    for _, group in groups(manifest("raycluster.yaml")):
        pod = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "x"},
            "template": group["template"],
        }
        validate.validate(pod, "1.31", strict=True)
    options = manifest("raycluster.yaml")["spec"]["autoscalerOptions"]
    shared = {
        "env",
        "envFrom",
        "image",
        "imagePullPolicy",
        "resources",
        "securityContext",
        "volumeMounts",
    }  # those of a container
    container = {"name": "autoscaler", **{name: value for name, value in options.items() if name in shared}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    validate.validate(pod, "1.31", strict=True)
    validate.validate(manifest("networkpolicy.yaml"), "1.31", strict=True)


def test_only_the_head_may_speak_to_kubernetes() -> None:
    """Workers open strangers' pictures, and KubeRay gives the account of the head rights to delete pods."""
    accounts = {
        one["metadata"]["name"]: one
        for one in yaml.safe_load_all((KUBERAY / "base" / "serviceaccounts.yaml").read_text())
    }
    pods = {name: group["template"]["spec"] for name, group in groups(manifest("raycluster.yaml"))}
    assert (
        {pod["serviceAccountName"] for pod in pods.values()} == set(accounts) == {"resshift", "resshift-head"}
    )
    assert [name for name, pod in pods.items() if pod["serviceAccountName"] == "resshift-head"] == ["head"]
    assert accounts["resshift"]["automountServiceAccountToken"] is False
    for name, pod in pods.items():
        assert pod.get("automountServiceAccountToken", True) == (name == "head")
    (trust,) = yaml.safe_load((ROOT / "deploy/aws/trust-eks.json").read_text())["Statement"]
    assert trust["Condition"]["StringEquals"]["YOUR-OIDC:sub"] == [
        f"system:serviceaccount:resshift:{name}" for name in sorted(accounts)
    ]


# What the operator refuses beyond the CRDs (validation.go of ray-project/kuberay, ValidateRayJobSpec and
# ValidateClusterUpgradeOptions), for the modes that the overlays use.
def operator_refuses_job(spec: Manifest) -> list[str]:
    found: list[str] = []
    if spec.get("submissionMode") == "SidecarMode":
        found += [
            key for key in ("clusterSelector", "submitterPodTemplate", "submitterConfig") if key in spec
        ]
        policy = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never")
        found += [] if policy == "Never" else ["restartPolicy"]
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        found.append("one of rayClusterSpec and clusterSelector")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        found.append("ttlSecondsAfterFinished")
    if "clusterSelector" in spec and spec.get("backoffLimit"):
        found.append("backoffLimit")
    return found


@pytest.mark.parametrize("name", JOBS)
def test_the_operator_takes_the_jobs(name: str) -> None:
    spec = manifest(name)["spec"]
    assert operator_refuses_job(spec) == []
    assert operator_refuses_job(
        {**spec, "submissionMode": "SidecarMode", "rayClusterSpec": manifest("raycluster.yaml")["spec"]}
    )


def kustomized(folder: Path) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kind_of(made: list[Manifest], kind: str) -> Manifest:
    (found,) = [one for one in made if one["kind"] == kind]
    return found


CLUSTER = manifest("raycluster.yaml")["spec"]
KINDS = {
    "base": ["NetworkPolicy", "RayCluster", "ServiceAccount", "ServiceAccount"],
    "overlays/job": ["NetworkPolicy", "RayJob", "ServiceAccount", "ServiceAccount"],
    "overlays/nightly": ["NetworkPolicy", "RayCronJob", "ServiceAccount", "ServiceAccount"],
    "overlays/history": [
        *("Deployment", "NetworkPolicy", "NetworkPolicy", "RayCluster", "Role", "RoleBinding", "Service"),
        *["ServiceAccount"] * 3,
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", KINDS)
def test_overlays_are_what_the_crds_and_the_operator_take(folder: str) -> None:
    made = kustomized(KUBERAY / folder)
    assert sorted(one["kind"] for one in made) == KINDS[folder]
    assert {one["metadata"]["namespace"] for one in made} == {"resshift"}
    for one in made:
        if one["apiVersion"] != "ray.io/v1":
            continue
        spec = one["spec"]
        if (history := spec.pop("historyServerOptions", None)) is not None:  # KubeRay 1.7
            assert refusals(history, "historyServerOptions") == []
        assert refusals(one) == []
        if one["kind"] != "RayCluster":
            job = spec["jobTemplate"] if one["kind"] == "RayCronJob" else spec
            assert job["rayClusterSpec"] == CLUSTER  # written once, in base
            assert operator_refuses_job(job) == []
            program, script, *arguments = shlex.split(job["entrypoint"])
            assert program == "python"
            assert load_script(str(Path(script).relative_to("/app"))).arguments().parse_args(arguments)


@pytest.mark.slow
def test_the_service_is_made_of_its_configuration_and_upgraded_step_by_step(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlays = tmp_path / "kuberay" / "overlays"
    (overlays / "service" / "rayservice.yaml").write_text(yaml.safe_dump(rendered_service()))
    plain = kustomized(overlays / "service")
    assert sorted(one["kind"] for one in plain) == [
        "NetworkPolicy",
        "RayService",
        "ServiceAccount",
        "ServiceAccount",
    ]
    assert refusals(kind_of(plain, "RayService")) == []
    made = kind_of(kustomized(overlays / "incremental"), "RayService")
    assert refusals(made) == []
    upgrade = made["spec"].pop("upgradeStrategy")
    assert upgrade["type"] == "NewClusterWithIncrementalUpgrade"
    options = upgrade["clusterUpgradeOptions"]
    assert 0 < options["stepSizePercent"] <= options["maxSurgePercent"] <= 100
    assert options["intervalSeconds"] > 0
    assert made["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True  # the operator demands it
    assert made == kind_of(plain, "RayService")
    # Its cluster has a generated name: the policy selects pods by the label that they bring along.
    (policy,) = [one for one in plain if one["kind"] == "NetworkPolicy"]
    for group in (CLUSTER["headGroupSpec"], *CLUSTER["workerGroupSpecs"]):
        assert (
            policy["spec"]["podSelector"]["matchLabels"].items()
            <= group["template"]["metadata"]["labels"].items()
        )


@pytest.mark.slow
@pytest.mark.parametrize("folder", KINDS)
def test_objects_of_kubernetes_itself_against_its_schemas(folder: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for one in kustomized(KUBERAY / folder):
        if one["apiVersion"] != "ray.io/v1":
            validate.validate(one, "1.31", strict=True)


def test_every_worker_tells_ray_before_its_pod_ends() -> None:
    for name, group in groups(manifest("raycluster.yaml")):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        if name == "head":
            assert "lifecycle" not in container
            continue
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:4] == ["python", "-m", "pipelines.cluster.notices", "--leave"]
        assert int(command[4]) <= pod.get("terminationGracePeriodSeconds", 30) - 10
