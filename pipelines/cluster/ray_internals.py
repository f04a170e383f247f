"""Every private name of Ray (2.60) that this project uses, in one place: what it is, why nothing public does.

tests/pipelines/cluster/test_ray_internals.py has a test for each, which fails first when Ray changes one, and
tests/test_boundaries.py keeps them out of every other module. Ray is imported inside the functions, so that a
process which needs one of its libraries does not load the others.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray
    from ray.data import DataContext
    from ray.serve.schema import ApplicationStatusOverview
    from ray.train import TrainingFailedError
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

STEP_S = 0.05  # half of what the loop itself waits for tasks (0.1 s)

# The loop that schedules asks a task for the metadata of its blocks itself, not in another thread. By default
# it takes note of a task's end one step later, so a worker waits 0.2 s from one task to the next instead of
# 0.1 s. There is no field for it; Ray reads the variable at the first execution of a process.
METADATA_INLINE = {"RAY_DATA_METADATA_PREFETCH_ON_THREAD": "0"}

# Warns once in each process that progress bars are off, which is what `enable_progress_bars` asked for.
PROGRESS_LOGGER = "ray.data._internal.progress"

# Warns at each start of a local cluster that it is closed to everybody else, which nobody has to act on.
TOKEN_LOGGER = "ray._private.authentication.authentication_token_setup"

# Lines of Ray that say nothing of a run in which all is well, by their texts, which are Ray's own. Serve's
# controller ends by being killed, and what waits for it meanwhile counts as failed and to be tried again:
# yellow lines at the end of every run. Large models take longer to load than the 30 s after which Serve
# warns, and progress says that they load; a proxy takes more than 5 s on a busy machine, and a command says
# so when it has none. The last is about an actor that Ray Train starts. Ray reads the pattern, documented for
# its logs, when it is imported in the process that prints them.
_NO_NEWS = (
    r"Task ServeController\.\w+ failed\. There are infinite retries remaining",
    r"replicas that have taken more than \d+s to initialize",
    r"This may be caused by a slow __init__ or reconfigure method",
    r"Proxy actor (readiness check for proxy on \w+ didn't complete|reported not ready on node)",
    r"Cannot deregister autoscaling state for deployment .* because it is not registered",
    r"Actor with class name: 'PreemptionWatcher' .* has constructor arguments in the object store",
)
SKIPPED_LINES = {"RAY_DEDUP_LOGS_SKIP_REGEX": "|".join(_NO_NEWS)}

# A function of Ray that is called before `ray.init` starts a cluster of its own, also in a thread of Serve's
# router that is late when a command ends: then a second cluster came up behind the last line of a job. Every
# command here calls `ray.init`. Ray reads the variable when it is imported.
NO_CLUSTER_BY_ITSELF = {"RAY_ENABLE_AUTO_CONNECT": "0"}

# Serve runs a replica's own code in a loop beside that of its actor, so that code which blocks holds up no
# health check. Code that never blocks only pays: two threads a request, which take the interpreter from each
# other. Serve reads the variable when a replica's process imports it.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}

# The variable that Ray's state API, which Ray Train asks, reads before it looks for a cluster on the machine.
# It is documented for `ray job submit` only.
CLUSTER_VARIABLE = "RAY_API_SERVER_ADDRESS"

# Flags of benchmarks that simulate a cluster: workers at the niceness of the raylet (the default is 15 more,
# and the cores are shared with the process that measures), a lost node that is noticed within seconds and not
# in the half minute that suits real networks, and an autoscaler that looks every second.
WORKERS_NOT_NICE = {"RAY_worker_niceness": "0"}
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}
QUICK_AUTOSCALER = {"AUTOSCALER_UPDATE_INTERVAL_S": "1"}
# A raylet aborts when its agent has not started in time, which takes half a minute on a busy machine.
PATIENT_RAYLETS = {"RAY_agent_register_timeout_ms": "300000"}


class Paced:
    """An `ExecutionCallback` of Ray Data: a step of an execution's scheduling loop lasts `STEP_S` at least.

    The loop is a thread of the consuming process, and waits only for tasks that are not done yet. When the
    consumer is the slower side, which is how training should be, all tasks are done or none may start, so
    nothing is waited for: the loop runs at full speed, with the interpreter's lock, for as long as training
    takes. Measured on two cores, tiny-x4: 44 % of the core that trains, 0.52 steps a second instead of 1.0.
    Steps that waited that long for tasks go on at once.

    Not derived from Ray's class, whose import loads Ray Data.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def before_execution_starts(self, executor: object) -> None:
        """Called by Ray Data before the loop starts."""

    def on_execution_step(self, executor: object) -> None:
        """Called by Ray Data after each step."""
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + STEP_S

    def after_execution_succeeds(self, executor: object) -> None:
        """Called by Ray Data when all is consumed."""

    def after_execution_fails(self, executor: object, error: Exception) -> None:
        """Called by Ray Data when an execution fails."""


def pace(context: DataContext) -> None:
    """Make the executions of a dataset's context take `Paced` steps."""
    paced: Any = Paced
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, paced]


# Seconds that Ray Train's controller waits for a group of workers to leave its process group when it ends
# them. One that waits for a lost worker does not leave; the default is 30 s. Read in the controller.
LEAVE_GROUP = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3"}


def detect_nccl_hangs(after_s: float) -> None:
    """Switch on Ray Train's detector of hung NCCL communicators for the trainers of this process; what the
    user has set stays.

    It asks NCCL every 15 s whether its communicators move, by the program `ncclras`, and fails the attempt
    with the stacks of all workers when they do not; without the program it says so and does nothing. There is
    no setting but these variables, which the driver reads.
    """
    wanted = {
        "RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR": "1",
        "RAY_TRAIN_NCCL_RAS_ACTION": "fail",
        "RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S": str(after_s),
    }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_train_asks_this_cluster() -> Generator[None]:
    """Tell the actors that Ray Train starts meanwhile which cluster is theirs, and `LEAVE_GROUP`; what the
    user has set stays.

    Beside a run, Ray Train keeps an actor that removes the run's placement group when its controller is gone.
    It asks the state API, and that of the cluster it finds first: unless told otherwise, the one that was
    started last on the machine. Another cluster knows no such controller, so the actor takes it for dead, and
    the workers of a healthy run are destroyed (a restart from the last checkpoint; seen when `ray start
    --head` ran beside a training job). Where several are found it ends in a traceback, and nobody cleans up.
    Ray Train hands a fixed set of variables of the driver on to its controller; there is no setting for more.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    wanted = {CLUSTER_VARIABLE: ray.get_runtime_context().gcs_address, **LEAVE_GROUP}
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    ENV_VARS_TO_PROPAGATE.update(added)
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.difference_update(added)
        for name in added:
            del os.environ[name]


def ask_before_restarts(trainer: DataParallelTrainer, allow: Callable[[TrainingFailedError], bool]) -> None:
    """Let `allow` decide, in Ray Train's controller, whether the workers are started again after a failure.

    Ray Train counts failures over the whole run and cannot tell a mistake that every attempt repeats from a
    lost machine; its `FailureConfig` takes numbers only.

    Args:
        trainer: Trainer that has not been started.
        allow: Function or bound method; it is pickled, and its state then lives in the controller.
    """
    from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy

    class Policy(FailurePolicy):
        def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
            return FailureDecision.RETRY if allow(training_failed_error) else FailureDecision.RAISE

    private: Any = trainer
    start = private._initialize_and_run_controller
    policy = Policy(private.run_config.failure_config)
    private._initialize_and_run_controller = lambda **given: start(**{**given, "failure_policy": policy})


def serve_host() -> str | None:
    """Return the address that Serve's proxies listen on, None without any. `serve.status()` does not say it,
    and the REST API that does needs the dashboard.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    http: Any = ray.get(controller.get_http_config.remote())
    return http.host


def app_status(app: str) -> ApplicationStatusOverview | None:
    """Return what `serve.status()` says of one application, None without it or without Serve.

    `serve.status()` checks the configuration of every deployment and pickles its router: 57 ms of the
    interpreter (three deployments, one core of an EPYC), with every look, beside requests that wait for it.
    The same from what it is made of takes 2.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

    try:
        controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None
    details: Any = ray.get(controller.get_serve_instance_details.remote())
    found = details["applications"].get(app)
    if found is None:
        return None
    deployments = {
        name: DeploymentStatusOverview(
            status=one["status"],
            status_trigger=one["status_trigger"],
            replica_states=dict(Counter(replica["state"].value for replica in one["replicas"])),
            message=one["message"],
        )
        for name, one in found["deployments"].items()
    }
    return ApplicationStatusOverview(
        status=found["status"],
        message=found["message"],
        last_deployed_time_s=found["last_deployed_time_s"],
        deployments=deployments,
    )


async def object_refs(response: Any) -> AsyncIterator[ray.ObjectRef]:
    """Return what a streaming call of a deployment yields as references, not values: pictures do not pass
    through the driver. A developer API, with an underscore.
    """
    return await response._to_object_ref_gen()


def begin_to_delete(app: str) -> None:
    """Ask Serve to delete an application, and return at once; `serve.delete` without its private argument
    waits a minute, and raises when a replica still computes.
    """
    from ray import serve

    serve.delete(app, _blocking=False)


def kill_replicas(app: str) -> None:
    """Kill the replicas of an application that are still computing results that no caller waits for. They are
    found by the names that Serve gives its actors.
    """
    import ray

    actors: Any = ray.util.list_named_actors(all_namespaces=True)  # Ray's type is that of the other form
    for actor in actors:
        if actor["name"].startswith(f"SERVE_REPLICA::{app}#"):
            with contextlib.suppress(ValueError):  # it ended after it was listed, which is what is wanted
                ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
