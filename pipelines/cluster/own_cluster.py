"""Ray Train's actors ask their own cluster, where there are several on a machine.

Beside a run, Ray Train (2.60) keeps an actor that removes the run's placement group when its controller is
gone. It asks the state API, and that of the cluster it finds first: without a word from outside the one that
was started last on the machine. Another cluster knows no such controller, so the actor takes it for dead, and
the workers of a healthy run are destroyed (a restart from the last checkpoint; seen when `ray start --head`
ran beside a training job). Where several are found it ends in a traceback, and nobody cleans up.

RAY_API_SERVER_ADDRESS is that word. Ray Train hands some variables of the driver on to its actors; this one
is added to them.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import ray
from ray._private.ray_constants import RAY_API_SERVER_ADDRESS_ENVIRONMENT_VARIABLE as VARIABLE
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE


@contextmanager
def named_to_ray_train() -> Generator[None]:
    """Name the connected cluster to the actors that Ray Train starts meanwhile; an address that the user has
    set stays.
    """
    if VARIABLE in os.environ:
        yield
        return
    os.environ[VARIABLE] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(VARIABLE)
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.discard(VARIABLE)
        del os.environ[VARIABLE]
