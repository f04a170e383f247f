"""What every worker of a training run does: build, resume, step, and log, validate and save when due.

The loop knows Ray Train for three things only: its rank, the notice that a node is about to be taken away,
and that an exception or a kill restarts all workers. What a step holds depends on (seed, step), so the
position in the data is the step.
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective
import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.cluster.admission import Patience
from pipelines.cluster.granted import granted_device
from pipelines.pairs.ranks import PairStream, rank_batches, start_dealer
from pipelines.pairs.share import left_by_workers
from pipelines.training import checkpoints
from pipelines.training.agreement import NOTICE, Decision, SaveAgreement
from pipelines.training.build_learner import build_learner, lpips_of, run_from_dict
from pipelines.training.checkpoints import CheckpointWriter, Keeping
from pipelines.training.export import publish_model
from pipelines.training.feeding import Fed, feed
from pipelines.training.log import Clock, TrainLog, memory_gib
from pipelines.training.validation import Renderer, Validator, held_out
from pipelines.training.watchdog import Watchdog
from resshift import storage, weights
from resshift.allocator import keep_freed_pages
from resshift.config import to_dict
from resshift.devices import PRECISIONS, is_emulated, num_cores
from resshift.models import WeightsError, unet_file
from resshift.training import checkpoint
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.slots import Slots
from resshift.training.step import Learner, TrainingDiverged, start_from

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """Configuration of a run and where its files are, as every worker gets them.

    Fields:
        config: Configuration of the run.
        data: Directory or prefix of the shards.
        out: Run directory.
        held_cpus: Logical CPUs that all workers hold together.
        init: Weights to begin with; None for random ones.
        val: Set to validate on, see `pipelines.training.validation`; None for none.
    """

    config: AnyRunConfig
    data: str
    out: str
    held_cpus: float
    init: str | None = None
    val: str | None = None

    def to_json(self) -> str:
        """Return the assignment as text; workers may run another process image than the driver, so no
        pickles.
        """
        values = {name: getattr(self, name) for name in ("data", "out", "held_cpus", "init", "val")}
        return json.dumps(values | {"config": to_dict(self.config), "kind": type(self.config).__name__})

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        values = json.loads(text)
        return cls(config=run_from_dict(values.pop("kind"), values.pop("config")), **values)


def train_worker(settings: Mapping[str, str]) -> dict[str, Any]:
    """Run the loop on one worker; Ray Train calls this in every worker process. Returns the summary of the
    run.

    Raises:
        Exception: The first error of any worker ends all of them: Ray Train's controller sees it within
            seconds, and `pipelines.training.failures` decides whether they start again.
    """
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = granted_device()
    if device.type == "cpu":
        torch.set_num_threads(max(1, num_cores() // context.get_local_world_size()))
        # A mask's -100 leaves exp(-100) behind softmax: a denormal, with which a matrix product takes ten
        # times as long.
        torch.set_flush_denormal(True)
        keep_freed_pages()  # 5 % of a step of tiny-x4 on one core
    assignment = Assignment.from_json(settings["assignment"])
    with (
        contextlib.closing(Watchdog(assignment.config.train.step_timeout_s)) as watchdog,
        contextlib.closing(TrainLoop(assignment, rank, num_ranks, device, watchdog)) as loop,
    ):
        return loop.run()


class TrainLoop:
    """One worker's run from the latest checkpoint to the last step."""

    def __init__(
        self, assignment: Assignment, rank: int, num_ranks: int, device: torch.device, watchdog: Watchdog
    ) -> None:
        self.watchdog = watchdog
        watchdog.long()
        self.assignment, self.config, self.train = assignment, assignment.config, assignment.config.train
        self.rank, self.num_ranks, self.device = rank, num_ranks, device
        self.lpips = lpips_of(self.config, device)
        self.learner: Learner = build_learner(
            self.config, self.lpips, device, Slots.of_rank(self.train.batch_size, rank, num_ranks)
        )
        self.state = self.learner.state
        attempt = self._resume()
        self.validator = self._validator()
        self.writer = CheckpointWriter(
            assignment.out, self.config, Keeping(self.train.keep_last, self.train.milestone_every), attempt
        )
        self.log = (
            TrainLog(assignment.out, self.config.log, self.state.step, self.train.steps)
            if rank == 0
            else None
        )
        self.clock = Clock()
        self.seen: list[dict[str, Any]] = []
        self.unchecked: list[tuple[int, list[str], Tensor]] = []
        self.agreement = SaveAgreement(
            self.state.step,
            self.train.checkpoint_every_s,
            ray.train.get_preemption_info,
            self._from_first,
        )
        self.figure: float | None = None

    def _resume(self) -> str:
        """Load the newest checkpoint that verifies; the first worker decides which, for all. Return the name
        of this start of the workers.
        """
        with tempfile.TemporaryDirectory(prefix="resshift-resume-") as temporary:
            directory = Path(temporary)
            step, attempt = self._chosen_step(directory)
            if step is None:
                if self.assignment.init is not None:
                    start_from(self.learner, weights.read_state_dict(unet_file(self.assignment.init)))
                return attempt
            checkpoint.load(self._on_this_node(step, directory), self.state, self.config, self.rank)
            if self.num_ranks > 1:
                ray.train.collective.barrier()  # before the directory goes that others read
            if self.rank == 0:
                logger.info(
                    "resumed step=%d rows=%d workers=%d", step, step * self.train.batch_size, self.num_ranks
                )
        return attempt

    def _on_this_node(self, step: int, directory: Path) -> Path:
        """Return where the workers of this machine find the checkpoint: the first of them has it in
        `directory`, which it has downloaded if it is not the first of all.
        """
        if self.num_ranks == 1:
            return directory
        context = ray.train.get_context()
        is_first_here = context.get_local_rank() == 0
        if is_first_here and self.rank:
            checkpoints.fetch(self.assignment.out, step, directory)
        places: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(places, (context.get_node_rank(), str(directory) if is_first_here else ""))
        return Path(next(path for node, path in places if node == context.get_node_rank() and path))

    def _chosen_step(self, directory: Path) -> tuple[int | None, str]:
        """Return the step to continue from and a name for this start, the same on all workers; the first then
        has the checkpoint in `directory`.
        """
        chosen: list[Any] = [None, None, uuid.uuid4().hex]
        if self.rank == 0:
            try:
                chosen[0] = checkpoints.fetch_latest(self.assignment.out, directory)
                checkpoints.clear(
                    self.assignment.out, Keeping(self.train.keep_last, self.train.milestone_every)
                )
            except WeightsError as error:
                chosen[1] = str(error)  # the other workers wait for an answer
        if self.num_ranks > 1:
            dist.broadcast_object_list(chosen)
        if chosen[1] is not None:
            raise WeightsError(chosen[1])
        return chosen[0], chosen[2]

    def _from_first(self, decision: Decision) -> Decision:
        """Return what the first worker has decided."""
        if self.num_ranks == 1:
            return decision
        # Plain values: the actor in between may run another process image.
        return Decision(*ray.train.collective.broadcast_from_rank_zero((decision.save, decision.ask_at)))

    def _validator(self) -> Validator | None:
        if self.assignment.val is None:
            return None
        config = self.config.validation
        held = held_out(
            self.assignment.val, config.pictures, self.train.seed, self.config.data, self.config.degradation
        )
        return Validator(
            held,
            config,
            self.lpips,
            self.device,
            self.rank,
            self.num_ranks,
            self.train.micro_batch,
            before_round=self.watchdog.step,
        )

    def run(self) -> dict[str, Any]:
        """Run all steps and return the summary (on the first worker)."""
        if self.rank == 0 and is_emulated(self.device, PRECISIONS[self.train.precision]):
            told = (
                "train.precision=%s is emulated on this CPU, float32 is much faster: --set "
                "train.precision=fp32, from the first step on"
            )
            logger.warning(told, self.train.precision)
        for batch, pictures, waited_s in self._batches():
            result = self.learner.step(pictures)
            # Until the next step ends. What is saved after this one prolongs it, on all workers: they wait
            # in the next step for the first one, which writes.
            self.watchdog.step()
            self.state.means.add(*result)
            self.clock.step(waited_s)
            keys = [str(key) for key in batch["key"]]
            self.unchecked.append((self.state.step - 1, keys, result.outcome.finite))
            if self.config.log.samples:
                self.seen.append({"step": self.state.step, "rows": batch["row"].tolist(), "keys": keys})
            self._run_due_actions()
        self.watchdog.long()
        return self._finish()

    def _batches(self) -> Generator[Fed]:
        """Yield this worker's batches."""
        if self.state.step >= self.train.steps:
            return
        stream = PairStream(
            root=self.assignment.data,
            config=self.config,
            num_ranks=self.num_ranks,
            held_cpus=self.assignment.held_cpus,
        )
        left_by_workers(self.assignment.held_cpus)  # refused on all workers, not in the dealer of the first
        dealer: list[Any] = [None]
        if self.num_ranks > 1:
            handle = start_dealer(stream) if self.rank == 0 else None  # kept: the dealer ends with it
            dealer[0] = handle and handle[0]
            dist.broadcast_object_list(dealer)
        start_row = self.state.step * self.train.batch_size
        source = rank_batches(stream, start_row, rank=self.rank, dealer=dealer[0])
        fed = feed(source, self.device, self.train.steps - self.state.step)
        patience = Patience(f"worker {self.rank} has been waiting for training pairs")
        try:
            while True:
                patience.waits()
                one = next(fed, None)
                patience.works()
                if one is None:
                    return
                yield one
        finally:
            patience.close()
            fed.close()

    def _run_due_actions(self) -> None:
        step, last = self.state.step, self.state.step == self.train.steps
        if step % self.train.log_every == 0 or last:
            self._log()
        validated = self.validator is not None and (step % self.config.validation.every == 0 or last)
        if validated:
            self._validate()
        # A validated step is saved, so that the best one exists.
        if step % self.train.checkpoint_every == 0 or last or validated:
            self._save(wait=last)
        elif reason := self.agreement.ask(step):
            if reason == NOTICE:
                logger.warning("step=%d %s: saving", step, reason)
            self._save(wait=reason == NOTICE)

    def _log(self) -> None:
        """Log the means since the last line. The one place in the loop that waits for the device."""
        window = self.state.means.steps
        means = self.state.means.pop()
        skipped, in_a_row = self.state.means.skips()
        self._record_skipped()
        if in_a_row >= self.train.max_skipped_steps:
            raise TrainingDiverged(
                f"the gradient was not finite for {in_a_row} steps in a row, last at step "
                f"{self.state.step - 1}; "
                f"the pictures are listed in {self.assignment.out}/skipped"
            )
        if self.log is not None:
            line: dict[str, float] = {"step": self.state.step, **means, "skipped": skipped}
            line["lr"] = self.learner.learning_rate(self.state.step - 1)
            line |= self.clock.read(self.train.batch_size, self.num_ranks)
            self.log.steps(
                line | {"memory_gib": memory_gib(self.device), "workers": self.num_ranks, "window": window}
            )
        self.clock.restart()

    def _record_skipped(self) -> None:
        """Write the keys of this worker's samples in skipped steps to OUT/skipped."""
        flags = torch.stack([finite for _, _, finite in self.unchecked]).tolist() if self.unchecked else []
        bad = [
            {"step": step, "keys": keys}
            for (step, keys, _), finite in zip(self.unchecked, flags, strict=True)
            if not finite
        ]
        self.unchecked = []
        if bad:
            logger.warning(
                "skipped=%d steps, their gradient is not finite, from step %d on", len(bad), bad[0]["step"]
            )
            text = "".join(json.dumps(line) + "\n" for line in bad)
            name = f"skipped/step-{self.state.step:08d}-rank-{self.rank}.jsonl"
            storage.write_bytes(storage.join(self.assignment.out, name), text.encode())

    def _validate(self) -> None:
        assert self.validator is not None
        renderer: Renderer = self.learner
        validated = self.validator(renderer)
        if self.log is not None and validated is not None:
            self.log.validation(self.state.step, validated.means, validated.grid_u8, validated.grid_png)
            self.figure = validated.means[self.config.validation.best]
        self.clock.restart()

    def _save(self, wait: bool) -> None:
        """Save; all workers call this at the same step. The copy is taken now, written and uploaded beside
        the next steps.
        """
        started = time.perf_counter()
        self.watchdog.long()
        self._save_step()
        if wait:
            self.writer.wait()
        self.agreement.saved(time.perf_counter() - started if wait else None)

    def _save_step(self) -> None:
        step, out = self.state.step, self.assignment.out
        if self.seen:
            lines = "".join(json.dumps(line) + "\n" for line in self.seen)
            storage.write_bytes(
                storage.join(out, f"seen/step-{step:08d}-rank-{self.rank}-of-{self.num_ranks}.jsonl"),
                lines.encode(),
            )
            self.seen = []
        # Collective, so every worker has written its lines before the checkpoint exists.
        if self.log is None:
            if (part := checkpoint.take_part(self.state)) is not None:
                self.writer.submit(part)
            return
        snapshot = checkpoint.take(self.state)
        figure, self.figure = self.figure, None
        after: list[Callable[[], None]] = []
        if figure is not None and self.validator is not None:
            name, higher = self.config.validation.best, self.validator.higher_is_better
            after.append(lambda: checkpoints.write_best(out, step, name, figure, higher))
        self.writer.submit(snapshot, before=[self.log.commit(step)], after=after)

    def _finish(self) -> dict[str, Any]:
        """Publish the model of the last step."""
        self.writer.wait()
        if self.rank:
            return {}
        out = self.assignment.out
        with tempfile.TemporaryDirectory(prefix="resshift-publish-") as directory:
            checkpoints.fetch(out, self.state.step, Path(directory))
            publish_model(Path(directory), out, self.config)
        return {"step": self.state.step}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
