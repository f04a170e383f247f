"""Each private name of Ray still is what `pipelines.cluster.ray_internals` takes it for.

Run first on a new version of Ray. Where one fails, what was relied on has changed: look at the function of
`ray_internals` that the test is named after, and at what the message says.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import MutableSet
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.cluster import ray_internals
from pipelines.cluster.ray_internals import CLUSTER_VARIABLE, STEP_S, Paced
from pipelines.pairs import ranks
from pipelines.shards.build import ShardOptions
from pipelines.shards.prepare import prepare_here
from resshift.presets import test_x4 as toy_preset

needs_cluster = [pytest.mark.ray, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


def loaded_again(name: str) -> ModuleType:
    """Run a module of Ray once more, beside the one in use: what it reads from the environment, it reads
    now.
    """
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name} any more"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- Ray Data


def test_paced_has_the_hooks_of_an_execution_callback() -> None:
    def hooks(kind: type) -> dict[str, list[str]]:
        members = inspect.getmembers(kind, inspect.isfunction)
        return {
            name: list(inspect.signature(one).parameters) for name, one in members if not name.startswith("_")
        }

    told = "Ray Data calls other hooks: Paced must have every one, with these arguments"
    assert hooks(Paced) == hooks(ExecutionCallback), told


def test_pace_adds_a_callback_that_executions_take_up() -> None:
    context = ray.data.DataContext()
    ray_internals.pace(context)
    told = "executions take their callbacks from elsewhere: see how planner.py of ray.data makes them"
    assert cast(Any, Paced) in context.execution_callback_classes, told


def test_a_step_lasts_and_one_that_waited_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    paced = Paced()
    for took in (0.0, 0.001, 0.02, 0.1, 0.0):
        now[0] += took
        paced.on_execution_step(None)
    assert slept == pytest.approx([0.0, STEP_S - 0.001, STEP_S - 0.02, 0.0, STEP_S])


@pytest.mark.parametrize(
    ("variables", "fetcher"),
    [(ray_internals.METADATA_INLINE, "InlineMetadataFetcher"), ({}, "ThreadedMetadataFetcher")],
)
def test_metadata_inline_chooses_the_fetcher(
    variables: dict[str, str], fetcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ray_internals.METADATA_INLINE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    module = loaded_again("ray.data._internal.execution.metadata_fetcher")
    told = "METADATA_INLINE no longer has an effect: workers wait 0.1 s longer between tasks"
    assert type(module.make_metadata_fetcher()).__name__ == fetcher, told


def test_progress_logger_is_the_one_that_tells_of_bars_that_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray.data._internal import progress

    warned: list[str] = []
    monkeypatch.setattr(progress, "log_once", lambda _: True)
    monkeypatch.setattr(logging.getLogger(ray_internals.PROGRESS_LOGGER), "warning", warned.append)
    context = ray.data.DataContext()
    context.enable_progress_bars = False
    progress.get_progress_manager(context, "dataset", cast(Any, {}), False)
    told = "another logger says that the bars are off, and commands print it unless PROGRESS_LOGGER names it"
    assert len(warned) == 1, told


def test_token_logger_is_the_one_that_tells_of_a_closed_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.authentication import authentication_token_setup as setup

    warned: list[str] = []
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setattr(setup, "_enable_token_auth", lambda: None)
    monkeypatch.setattr(logging.getLogger(ray_internals.TOKEN_LOGGER), "warning", warned.append)
    assert setup.enable_token_auth_by_default()
    assert len(warned) == 1, "another logger tells of tokens, and commands print it"


def test_ray_starts_no_cluster_by_itself() -> None:
    """In a process of its own: Ray reads the variable when it is imported."""
    program = (
        "import ray\ntry: ray.get_actor('x')\nexcept Exception as error: print(type(error).__name__, error)"
    )
    env = os.environ | ray_internals.NO_CLUSTER_BY_ITSELF
    ended = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert "Ray has not been started yet" in ended.stdout, ended


def test_lines_that_are_no_news_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import ray_logging, worker

    ((name, pattern),) = ray_internals.SKIPPED_LINES.items()
    monkeypatch.setenv(name, pattern)
    read = getattr(loaded_again("ray._private.ray_constants"), name)
    monkeypatch.setattr(ray_logging, "RAY_DEDUP_LOGS", True)
    monkeypatch.setattr(worker, "stdout_deduplicator", ray_logging.LogDeduplicator(5, None, read))
    retry = "There are infinite retries remaining, so the task will be retried. Error: The actor is dead"
    for line in (
        f"Task ServeController.graceful_shutdown failed. {retry}",
        f"Task ServeController.listen_for_change failed. {retry}",
        "WARNING controller 7 -- Deployment 'model' in application 'a' has 1 replicas that have taken more "
        "than 30s to initialize.",
        "core_worker.cc:2465: Actor with class name: 'PreemptionWatcher' and ID: '18' has constructor "
        "arguments in the object store and max_restarts > 0.",
        "WARNING controller 7 -- Proxy actor readiness check for proxy on 0a1b didn't complete in 5.0s.",
        "WARNING controller 7 -- Proxy actor reported not ready on node 0a1b",
        "WARNING controller 7 -- Cannot deregister autoscaling state for deployment "
        "Deployment(name='keeper', app='resshift') because it is not registered",
        f"Task _store failed. {retry}",  # this one is news
    ):
        # As Ray's own thread prints what its processes report to the driver.
        worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    told = "Ray prints by other ways, or reads another variable: commands end with its yellow lines"
    (shown,) = capsys.readouterr().out.splitlines()
    assert "_store" in shown, told


class TestTheLoopBehindThePairs:
    pytestmark = needs_cluster

    def test_it_is_paced_while_a_consumer_thinks(
        self, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray Data alone turns some hundred times a second."""
        prepare_here(str(tree), str(tmp_path / "s"), ShardOptions(row_group_rows=3))
        ends: list[float] = []

        class Recorded(Paced):
            def on_execution_step(self, executor: object) -> None:
                super().on_execution_step(executor)
                ends.append(time.monotonic())

        monkeypatch.setattr(ray_internals, "Paced", Recorded)
        batches = ranks.rank_batches(ranks.PairStream(root=str(tmp_path / "s"), config=toy_preset()), 0)
        next(batches)
        turns = len(ends)
        time.sleep(20 * STEP_S)
        names = [thread.name for thread in threading.enumerate()]
        batches.close()
        gaps = np.diff(ends)
        assert len(ends) > turns, "the loop does not call Paced: does it still call on_execution_step?"
        assert gaps.min() > 0.99 * STEP_S
        assert any(name.startswith("StreamingExecutor") for name in names)
        assert "ray-data-metadata-prefetch" not in names, "see METADATA_INLINE, which tests/conftest.py sets"


# --- Ray Train


def test_ray_train_hands_on_a_set_of_variables_that_can_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal import constants

    monkeypatch.setenv(CLUSTER_VARIABLE, "10.0.0.1:6379")
    told = (
        "ray_train_asks_this_cluster adds to ENV_VARS_TO_PROPAGATE: which variables reach Ray Train's actors?"
    )
    assert isinstance(constants.ENV_VARS_TO_PROPAGATE, MutableSet), told
    assert CLUSTER_VARIABLE not in constants.get_env_vars_to_propagate(), f"no longer needed: {told}"
    monkeypatch.setattr(constants, "ENV_VARS_TO_PROPAGATE", {CLUSTER_VARIABLE})
    assert constants.get_env_vars_to_propagate() == {CLUSTER_VARIABLE: "10.0.0.1:6379"}, told


def test_the_state_api_asks_the_cluster_of_the_variable_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.dashboard.utils import get_address_for_submission_client

    monkeypatch.setenv(CLUSTER_VARIABLE, "http://10.0.0.1:8265")
    told = "Ray Train's placement group cleaner asks another cluster again: see ray_train_asks_this_cluster"
    assert get_address_for_submission_client(None) == "http://10.0.0.1:8265", told


def test_an_address_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.2:6379"))
    monkeypatch.setenv(CLUSTER_VARIABLE, "http://10.0.0.1:8265")
    with ray_internals.ray_train_asks_this_cluster():
        assert os.environ[CLUSTER_VARIABLE] == "http://10.0.0.1:8265"
    assert os.environ[CLUSTER_VARIABLE] == "http://10.0.0.1:8265"


def test_ask_before_restarts_puts_its_rule_in_the_place_of_rays(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import WorkerGroupError
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.failure_handling import FailureDecision
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    given: dict[str, Any] = {}
    monkeypatch.setattr(
        DataParallelTrainer, "_initialize_and_run_controller", lambda _, **named: given.update(named)
    )
    trainer: Any = TorchTrainer(lambda: None)
    ray_internals.ask_before_restarts(trainer, lambda error: "again" in str(error))
    trainer._initialize_and_run_controller(failure_policy="that of Ray", callbacks=[])
    assert given["callbacks"] == []
    told = "Ray Train's controller is given its failure policy in another way: its own rule is in force again"
    assert inspect.getsource(DataParallelTrainer.fit).count("failure_policy=") == 1, told
    decide = given["failure_policy"].make_decision
    assert decide(WorkerGroupError("again", {})) is FailureDecision.RETRY, told
    assert decide(WorkerGroupError("no", {})) is FailureDecision.RAISE, told


def test_detect_nccl_hangs_switches_rays_detector_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.nccl_ras import NCCLRASCallback

    monkeypatch.setattr(os, "environ", dict(os.environ))
    trainer: Any = TorchTrainer(lambda: None)
    told = "hung NCCL communicators are not seen: what does Ray Train's detector ask for?"
    ray_internals.detect_nccl_hangs(77.0)
    found = [one for one in trainer._create_default_callbacks() if isinstance(one, NCCLRASCallback)]
    assert len(found) == 1, told
    detector: Any = found[0]
    assert (detector._action, detector._confirm_duration_s) == ("fail", 77.0), told


def test_leave_group_is_the_timeout_of_the_backend() -> None:
    from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S

    told = "a group with a lost worker takes half a minute to end"
    assert list(ray_internals.LEAVE_GROUP) == [TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S], told


@ray.remote(num_cpus=0)
def state_of(actor_id: str) -> str | None:
    """What an actor of Ray Train asks, in a process of its own."""
    from ray.util.state import get_actor

    state: Any = get_actor(actor_id, timeout=30)
    return state and state.state


@ray.remote(num_cpus=0)
class Controller:
    def actor_id(self) -> str:
        return ray.get_runtime_context().get_actor_id() or ""


class TestTheClusterOfTheDriver:
    pytestmark = needs_cluster

    def test_it_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ray.train.v2._internal.constants import get_env_vars_to_propagate

        monkeypatch.delenv(CLUSTER_VARIABLE, raising=False)
        # Ray's decorator hides `remote` from type checkers.
        actor, task = cast(Any, Controller), cast(Any, state_of)
        controller = actor.remote()
        actor_id = ray.get(controller.actor_id.remote())
        with ray_internals.ray_train_asks_this_cluster():
            handed_on = get_env_vars_to_propagate()
            assert handed_on[CLUSTER_VARIABLE] == ray.get_runtime_context().gcs_address
            assert ray.get(task.options(runtime_env={"env_vars": handed_on}).remote(actor_id)) == "ALIVE"
        assert CLUSTER_VARIABLE not in os.environ
        assert CLUSTER_VARIABLE not in get_env_vars_to_propagate()


# --- Ray Serve; tests/serve/test_serve.py and tests/pipelines/bulk/test_scheduler.py use them on a real one


def test_serve_host_asks_the_controller_for_its_http_config() -> None:
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve._private.controller import ServeController
    from ray.serve.config import HTTPOptions

    told = "serve_host cannot tell whether Serve listens beyond this machine"
    assert isinstance(SERVE_CONTROLLER_NAME, str), told
    assert isinstance(SERVE_NAMESPACE, str), told
    # A process that has started Serve finds an argument of Ray's tracing on every method of an actor.
    parameters = inspect.signature(ServeController.get_http_config).parameters
    assert [name for name in parameters if name != "_ray_trace_ctx"] == ["self"], told
    assert inspect.signature(ServeController.get_http_config).return_annotation in (
        HTTPOptions,
        "HTTPOptions",
    )
    assert HTTPOptions(host="10.0.0.1").host == "10.0.0.1", told


def test_one_loop_is_what_a_replica_reads_when_it_starts() -> None:
    told = "import ray.serve._private.replica as r; print(r.RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD)"
    for variables, separate in ((ray_internals.ONE_LOOP, "False"), ({}, "True")):
        environment = {
            name: value for name, value in os.environ.items() if name not in ray_internals.ONE_LOOP
        }
        done = subprocess.run(
            [sys.executable, "-c", told],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == separate


def test_app_status_asks_the_controller_for_its_details(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.controller import ServeController

    parameters = list(inspect.signature(ServeController.get_serve_instance_details).parameters.values())
    required = [one.name for one in parameters if one.default is inspect.Parameter.empty]
    assert [name for name in required if name != "_ray_trace_ctx"] == ["self"], "app_status cannot look"

    def nobody(*_: object, **__: object) -> None:
        raise ValueError("there is no such actor")

    monkeypatch.setattr("ray.get_actor", nobody)
    assert ray_internals.app_status("resshift") is None


def test_object_refs_awaits_the_stream_of_a_response() -> None:
    from ray.serve.handle import DeploymentResponseGenerator

    method = getattr(DeploymentResponseGenerator, "_to_object_ref_gen", None)
    told = "object_refs has no other way to references: pictures of bulk jobs would pass through the driver"
    assert inspect.iscoroutinefunction(method), told
    assert list(inspect.signature(method).parameters) == ["self"], told


def test_begin_to_delete_need_not_wait() -> None:
    from ray import serve

    told = "begin_to_delete passes _blocking=False, so that a job that was interrupted ends within seconds"
    assert inspect.signature(serve.delete).parameters["_blocking"].default is True, told


def test_kill_replicas_finds_them_by_name() -> None:
    from ray.serve._private.common import DeploymentID, ReplicaID

    replica = ReplicaID(unique_id="abc", deployment_id=DeploymentID(name="model", app_name="resshift-1"))
    told = "kill_replicas finds no replica: they are actors of another name"
    assert replica.to_full_id_str() == "SERVE_REPLICA::resshift-1#model#abc", told


# --- Flags of simulated clusters


def test_a_replica_that_ends_by_itself_hinders_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[str] = []

    def get_actor(name: str, namespace: str) -> str:
        if name.endswith("gone"):
            raise ValueError(f"Failed to look up actor with name {name!r}")
        return name

    names = (
        "SERVE_REPLICA::app#model#gone",
        "SERVE_REPLICA::app#model#there",
        "SERVE_REPLICA::other#model#a",
    )
    listed = [{"name": name, "namespace": "serve"} for name in names]
    monkeypatch.setattr(ray.util, "list_named_actors", lambda all_namespaces: listed)
    monkeypatch.setattr(ray, "get_actor", get_actor)
    monkeypatch.setattr(ray, "kill", killed.append)
    ray_internals.kill_replicas("app")
    assert killed == ["SERVE_REPLICA::app#model#there"]


def test_quick_health_checks_are_flags_of_ray() -> None:
    from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue] - compiled

    flags = [name.removeprefix("RAY_") for name in ray_internals.QUICK_HEALTH_CHECKS]
    told = "QUICK_HEALTH_CHECKS names flags that Ray no longer has: a lost node costs half a minute"
    assert [name for name in flags if not hasattr(Config, name)] == [], told


def test_quick_autoscaler_sets_its_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ray_internals.QUICK_AUTOSCALER.items():
        monkeypatch.setenv(name, value)
    module = loaded_again("ray.autoscaler._private.constants")
    told = "QUICK_AUTOSCALER no longer sets how often the autoscaler looks: benchmarks/autoscale.py waits"
    assert module.AUTOSCALER_UPDATE_INTERVAL_S == 1, told


class TestWorkersNotNice:
    pytestmark = needs_cluster

    def test_workers_have_the_niceness_of_the_driver(self) -> None:
        task: Any = ray.remote(num_cpus=0)(lambda: os.nice(0))
        told = "WORKERS_NOT_NICE, which tests/conftest.py sets, has no effect: workers run behind all else"
        assert ray.get(task.remote()) == os.nice(0), told
