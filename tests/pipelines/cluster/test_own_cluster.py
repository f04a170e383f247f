"""Ray Train's actors are told which cluster is theirs."""

from __future__ import annotations

import os
from typing import Any, cast

import pytest
import ray
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from pipelines.cluster.own_cluster import VARIABLE, named_to_ray_train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


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


def test_the_cluster_of_the_driver_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    actor, task = (
        cast(Any, Controller),
        cast(Any, state_of),
    )  # Ray's decorator hides `remote` from type checkers
    controller = actor.remote()
    actor_id = ray.get(controller.actor_id.remote())
    with named_to_ray_train():
        handed_on = get_env_vars_to_propagate()
        assert handed_on[VARIABLE] == ray.get_runtime_context().gcs_address
        assert ray.get(task.options(runtime_env={"env_vars": handed_on}).remote(actor_id)) == "ALIVE"
    assert VARIABLE not in os.environ
    assert VARIABLE not in get_env_vars_to_propagate()


def test_an_address_of_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "http://10.0.0.1:8265")
    with named_to_ray_train():
        assert os.environ[VARIABLE] == "http://10.0.0.1:8265"
    assert os.environ[VARIABLE] == "http://10.0.0.1:8265"
