"""Real worker processes over gloo for tests, ended so that nothing of theirs can crash on the way out."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.servers import free_port


def run_workers(num_ranks: int, work: Callable[..., None], *args: Any, ranks_of_node: int = 0) -> None:
    """Run `work(rank, *args)` in as many processes, with one thread each and the default process group.

    Args:
        num_ranks: Number of workers.
        work: Function of a module; what a worker finds has to be in a file when it returns.
        args: Its arguments.
        ranks_of_node: Workers of each pretended node; 0 for all.
    """
    call = (free_port(), num_ranks, ranks_of_node or num_ranks, work, args)
    mp.spawn(_worker, call, nprocs=num_ranks)  # type: ignore[attr-defined]


def _worker(
    rank: int, port: int, num_ranks: int, ranks_of_node: int, work: Callable[..., None], args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_of_node)
    store = f"tcp://127.0.0.1:{port}"
    # Generous: a worker may wait for another one that a busy machine does not run.
    timeout = timedelta(seconds=800)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=timeout)
    work(rank, *args)
    gc.collect()  # modules and their hooks are cycles; they hold gradients that a thread of gloo works at
    dist.barrier()  # nobody closes connections that another worker still reads
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # The groups of a device mesh and their threads outlive `destroy_process_group` (torch 2.15: three of
    # five groups after DDP, FSDP2 and HSDP, also when nothing refers to the modules). What such a thread
    # frees while the interpreter is finalised ends the process with SIGSEGV or SIGABRT, so it is not. Ray
    # kills the workers of a training run in the same way.
    os._exit(0)
