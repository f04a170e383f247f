"""Training in plain PyTorch: the state of a run and one step of it, independent of the sources of batches and
of the machines.

The step t of the chain and the noise of a sample are functions of (seed, step, slot), where the slot is its
place in the global batch: they are drawn for the whole batch, and each worker takes its slots. The division
of the batch into workers and micro-batches changes results by rounding only. Dropout is the exception: it is
drawn for each micro-batch from (seed, step, first slot). The learning rate is a function of the step, and
there is no other random state, so a state that is saved and loaded continues the same curve.

Nothing in a step waits for the device; means are computed there (`resshift.training.running_means`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from resshift import seeds
from resshift.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from resshift.degradation.on_device.chain import DeviceDegradation
from resshift.devices import PRECISIONS, autocast
from resshift.models import WeightsError
from resshift.networks.conv_unet import ConvUNet, build_unet, from_one_step
from resshift.networks.holes import fill_holes
from resshift.networks.unet import UNetSwin
from resshift.sampler import network_denoiser, sample
from resshift.training import parts
from resshift.training.average import MovingAverage
from resshift.training.losses import Objective
from resshift.training.optimizer import Outcome, adamw, guarded_step, run_learning_rate, set_learning_rate
from resshift.training.running_means import RunningMeans
from resshift.training.sharding import load_optimizer, shard, sharded_like, synchronise_gradients, whole
from resshift.training.slots import Slots
from resshift.weights import is_derived, load_into

Module = TypeVar("Module", bound=nn.Module)
TERMS = ("loss", "mse", "lpips", "lattice")


class TrainingDiverged(RuntimeError):
    """The gradients of too many steps in a row were not finite; the message names pictures of the last
    step.
    """


class StepResult(NamedTuple):
    """Result of a step, on the device.

    Fields:
        terms: Contribution of this worker to the mean of each term over the global batch.
        outcome: Outcome of the step.
    """

    terms: dict[str, Tensor]
    outcome: Outcome


class Learner(Protocol):
    """The trainable networks of a run, with their state and their training step."""

    state: TrainState

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run one optimiser step on this worker's slots of the global batch; `state.step` grows by one."""
        ...

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of the step with index `step`, for the log."""
        ...

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return the pictures that the averaged weights compute from a batch, (B, 3, H, W), about [-1, 1]: a
        function of the weights, the batch and the keys.
        """
        ...


class TrainState:
    """State of a run.

    Args:
        networks: Networks by name, on their device and wrapped for training; the first one is averaged.
        ema: Moving average of the first network.
        optimizers: Optimisers by the name of their network.
        scaler: Scaler of the loss, disabled unless precision is fp16.
        means: Means of the loss terms since the last log line.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        ema: MovingAverage,
        optimizers: dict[str, torch.optim.Optimizer],
        scaler: GradScaler,
        means: RunningMeans,
    ) -> None:
        self.networks = networks
        self.ema = ema
        self.optimizers = optimizers
        self.scaler = scaler
        self.means = means
        self.step = 0

    @property
    def network(self) -> nn.Module:
        """The first network, with its wrapper."""
        return next(iter(self.networks.values()))

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the first network."""
        return next(iter(self.optimizers.values()))

    @property
    def place(self) -> parts.Place | None:
        """Place of this worker among those that share the state; None if it is not sharded."""
        first = next(self.network.parameters())
        return parts.place_of(first) if isinstance(first, DTensor) else None

    def weights(self, keep: bool = True, average_only: bool = False) -> dict[str, dict[str, Tensor]]:
        """Return {"model": ..., "ema": ...}, whole and on the CPU, without derived buffers. A collective
        operation if the networks are sharded; without `keep` this worker only takes part in it.
        """
        networks = {} if average_only else self.networks
        modules = {name: unwrapped(network) for name, network in networks.items()} | {"ema": self.ema.module}
        found = {
            name: {key: whole(value, keep) for key, value in stored_tensors(module).items()}
            for name, module in modules.items()
        }
        if not keep:
            return {}
        return {
            name: {key: value.contiguous() for key, value in state.items()} for name, state in found.items()
        }

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return weights and moments, as they are, by the names that they have in the files of a sharded
        state: "model/KEY" and "optimizers/model/INDEX/NAME".
        """
        moments = {
            f"optimizers/{name}/{index}/{key}": value
            for name, optimizer in self.optimizers.items()
            for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
            if is_moment(value)
        }
        return self._network_tensors() | moments

    def _network_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name, network in self.networks.items()
            for key, value in stored_tensors(unwrapped(network)).items()
        }

    def state_dict(self, keep: bool = True, moments: bool = True) -> dict[str, Any]:
        """Return the state except for the weights, whole and on the CPU. A collective operation; without
        `keep` this worker only takes part in it, and gets no moments. They may be left out, as they are in
        `shared_tensors`.
        """
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        if not moments:
            for state in states.values():
                state["state"] = {
                    index: {key: value for key, value in entry.items() if not is_moment(value)}
                    for index, entry in state["state"].items()
                }
        return {
            "optimizers": {name: whole(state, keep) for name, state in states.items()},
            "scaler": self.scaler.state_dict(),
            "tally": self.means.state_dict(),
            "step": self.step,
            "ema_updates": self.ema.updates,
        }

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load the result of `weights`.

        Raises:
            WeightsError: Names or shapes do not fit.
        """
        for name, network in self.networks.items():
            load_whole(unwrapped(network), weights[name])
        load_whole(self.ema.module, weights["ema"])

    def load_parts(self, shared: parts.Parts, average: parts.Parts, state: Mapping[str, Any]) -> None:
        """Load `shared_tensors` and the average from files, each worker its own rows, and the moments into
        `state`, the result of `state_dict` without them.

        Raises:
            WeightsError: Names or shapes do not fit. Nothing is changed.
        """
        moments: dict[str, Tensor] = {}
        for name, optimizer in self.optimizers.items():
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            for found in shared.names(f"optimizers/{name}/"):
                moments[found] = parameters[int(found.split("/")[2])]
        weights = self._network_tensors()
        average_weights = stored_tensors(self.ema.module)
        shared.check(weights | moments)
        average.check(average_weights)
        for source, values in ((shared, weights), (average, average_weights)):
            for key, value in values.items():
                parts.local(value).copy_(source.read(key, value))
        for found, parameter in moments.items():
            _, name, index, key = found.split("/")
            moment = parts.like(shared.read(found, parameter), parameter)
            state["optimizers"][name]["state"][int(index)][key] = moment

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0) -> None:
        """Load the result of `state_dict`."""
        for name, optimizer in self.optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        self.means.load_state_dict(state["tally"], rank)
        self.step = state["step"]
        self.ema.updates = state["ema_updates"]


def unwrapped(network: nn.Module) -> nn.Module:
    """Return a network without its DDP wrapper."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return what checkpoints hold of a module; it shares memory with the module."""
    return {key: value for key, value in module.state_dict().items() if not is_derived(key)}


def is_moment(value: Any) -> bool:
    """Tell whether an entry of an optimiser's state has the shape of a parameter."""
    return isinstance(value, Tensor) and value.ndim > 0


def load_whole(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights as `weights.load_into` does, into a module that may be sharded."""
    ours = module.state_dict()
    fitting = all(key in ours and ours[key].shape == value.shape for key, value in weights.items())
    load_into(
        module,
        {key: sharded_like(value, ours[key]) for key, value in weights.items()} if fitting else weights,
    )


def seeded(build: Callable[[Any], Module], config: Any, train: TrainConfig, name: str = "init") -> Module:
    """Build a module with initial weights that are a function of the run's seed alone, and so are the same on
    every worker.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(train.seed, name) % 2**63)
        return build(config)


def build_network(config: RunConfig) -> UNetSwin | ConvUNet:
    """Return the U-Net with its initial weights."""
    network = seeded(build_unet, config.model.unet, config.train)
    network.checkpoint_activations = config.train.activation_checkpointing
    return network


# Buffers are constants, alike on all workers: none needs to be sent in a step. Torch 2.13 has another name
# for it, and warns at the former one.
_KEEP_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)


def distributed(network: nn.Module, train: TrainConfig, device: torch.device, num_ranks: int) -> nn.Module:
    """Compile a network if the run is configured so, and wrap it for several workers."""
    if train.compile != "off":
        network.compile(mode=train.compile)
    if num_ranks == 1:
        return network
    if train.parallel != "ddp":
        return shard(network, device, train.parallel, train.gradient_dtype)
    # Gradients are views of the buckets that are sent, which saves a copy of every gradient. Buffers are
    # masks and indices, which are the same on all workers.
    ids = [device] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True, device_ids=ids, **_KEEP_BUFFERS)
    if train.gradient_dtype == "bf16":
        # Imported here: it loads every hook that torch has.
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


def build_state(
    train: TrainConfig,
    networks: Mapping[str, tuple[nn.Module, OptimConfig]],
    terms: tuple[str, ...],
    num_ranks: int = 1,
) -> TrainState:
    """Return the state at step 0.

    Args:
        train: Training configuration of the run.
        networks: Networks and the configurations of their optimisers, by name; on their device, not wrapped.
        terms: Names of the loss terms.
        num_ranks: Number of workers of the run.
    """
    first, _ = next(iter(networks.values()))
    device = next(first.parameters()).device
    # The average is made before the network is wrapped: a sharded network cannot be copied.
    ema = MovingAverage(first, train.ema_decay)
    if num_ranks > 1 and train.parallel != "ddp":
        shard(ema.module, device, train.parallel)
    wrapped = {
        name: distributed(network, train, device, num_ranks) for name, (network, _) in networks.items()
    }
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: adamw(wrapped[name], optim) for name, (_, optim) in networks.items()
    }
    scaler = GradScaler(device.type, enabled=train.precision == "fp16")
    return TrainState(wrapped, ema, optimizers, scaler, RunningMeans(terms, device))


def diffusion_state(config: RunConfig, network: nn.Module, num_ranks: int = 1) -> TrainState:
    """Return the state at step 0 of a U-Net that is on its device and not wrapped."""
    return build_state(config.train, {"model": (network, config.optim)}, TERMS, num_ranks)


def to_unit_range(pictures_u8: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]. Called on the device: bytes are a quarter of the
    floats to copy there.
    """
    return pictures_u8.permute(0, 3, 1, 2).float() / 127.5 - 1


def mask_to_unit_range(mask_u8: Tensor) -> Tensor:
    """(B, H, W) uint8, 255 in a hole -> (B, 1, H, W) float32, 1 in a hole and -1 where the picture is
    kept.
    """
    return mask_u8[:, None].float() / 127.5 - 1


class Pictures:
    """Pictures of a batch in [-1, 1]; with `data.degrade_on=device` the low-quality ones are made here."""

    def __init__(self, config: RunConfig) -> None:
        self._model = config.model
        self._degradation = (
            DeviceDegradation(config.degradation, config.data.crop_px)
            if config.data.degrade_on == "device"
            else None
        )

    def __call__(self, batch: Mapping[str, Tensor], part: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return hq, lq and, for inpainting, the mask of some samples of a batch."""
        hq_u8 = batch["hq"][part]
        lq_u8 = (
            batch["lq"][part] if self._degradation is None else self._degradation(hq_u8, batch["plan"][part])
        )
        mask_u8 = batch["mask"][part] if self._model.fills_holes else None
        return to_unit_range(hq_u8), *_seen(self._model, lq_u8, mask_u8)


def _seen(model: ModelConfig, lq_u8: Tensor, mask_u8: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return what the network sees of low-quality pictures and masks."""
    lq = to_unit_range(lq_u8)
    if mask_u8 is None:
        return lq, None
    mask = mask_to_unit_range(mask_u8)
    return (fill_holes(lq, mask) if model.hole == "surroundings" else lq), mask


def draw_noise(
    config: RunConfig, step: int, slots: Slots, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Draw t and the noise of a worker's slots.

    They are drawn for the whole batch, so that they do not depend on the number of workers; a million normal
    numbers take microseconds on a GPU.

    Args:
        config: Configuration of the run.
        step: Index of the step.
        slots: Slots of the worker.
        shape: Shape of one latent, (Z, h, w).
        device: Device of the batch. CPU and CUDA draw different numbers.

    Returns:
        t, int64 (B,) in [0, T), and noise, float32 (B, Z, h, w).
    """
    generator = seeds.torch_generator(config.train.seed, "train", step, device=device)
    t = torch.randint(config.model.schedule.steps, (slots.batch_size,), generator=generator, device=device)
    noise = torch.randn((slots.batch_size, *shape), generator=generator, device=device)
    own = slice(slots.start, slots.stop)
    return t[own], noise[own]


def shares(network: nn.Module, slots: Slots, micro_batch: int) -> Iterator[tuple[slice, float]]:
    """Yield each micro-batch and the factor of its mean loss; the last one averages gradients over the
    workers.

    The factors give every sample the same weight. Gradients are averaged over the workers, so the factors of
    a worker add up to its number of samples times num_ranks / batch_size.
    """
    parts = slots.micro_batches(micro_batch)
    for i, part in enumerate(parts):
        synchronise_gradients(network, i == len(parts) - 1)
        yield part, (part.stop - part.start) / slots.batch_size * slots.num_ranks


class DiffusionLearner:
    """The U-Net of a run.

    Args:
        config: Configuration of the run.
        network: U-Net on its device, not wrapped.
        objective: Loss of a batch.
        slots: Slots of this worker; None if there is one worker.
    """

    def __init__(
        self, config: RunConfig, network: nn.Module, objective: Objective, slots: Slots | None = None
    ) -> None:
        self.config = config
        self.objective = objective
        self.pictures = Pictures(config)
        self.slots = slots or Slots.of_rank(config.train.batch_size)
        self.state = diffusion_state(config, network, self.slots.num_ranks)

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run one optimiser step.

        Args:
            batch: Samples of this worker's slots: "hq" (B, H, W, 3), "lq" (B, H / scale, W / scale, 3) and,
                for inpainting, "mask" (B, H / scale, W / scale) with 255 in a hole; with
                `data.degrade_on=device` "plan" (B, PLAN_BYTES) instead of "lq"; uint8, on the device of the
                network.

        Returns:
            The terms named by `TERMS`, and the outcome.
        """
        state = self.state
        set_learning_rate(state.optimizer, self.learning_rate(state.step))
        state.network.train()
        terms = self.backward(batch)
        outcome = guarded_step(state.optimizer, self.config.optim.clip_norm, state.scaler)
        # Also after a skipped step, so that nothing needs to be read from the device.
        state.ema.update(unwrapped(state.network))
        state.step += 1
        return StepResult(terms, outcome)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return run_learning_rate(step, self.config.optim, self.config.train)

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return what the averaged weights make of "lq", see `render_chain`."""
        return render_chain(self.config, self.objective, self.state.ema.module, batch, keys)

    def backward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the gradients of a batch, which is the first half of `step`, and return this worker's
        contribution to the terms.
        """
        state, train, model = self.state, self.config.train, self.config.model
        device = batch["hq"].device
        t, noise = draw_noise(self.config, state.step, self.slots, latent_shape(model, batch["hq"]), device)
        corner = lpips_corner(self.config, state.step)
        sums = [torch.zeros((), device=device) for _ in TERMS]
        for part, factor in shares(state.network, self.slots, train.micro_batch):
            # Dropout draws from torch's global generator.
            torch.manual_seed(
                seeds.derive(train.seed, "dropout", state.step, self.slots.start + part.start) % 2**63
            )
            hq, lq, mask = self.pictures(batch, part)
            with autocast(device, PRECISIONS[train.precision]):
                terms = self.objective(state.network, hq, lq, t[part], noise[part], mask, corner)
            state.scaler.scale(terms.total * factor).backward()
            sums = [
                total + term.detach() * (factor / self.slots.num_ranks)
                for total, term in zip(sums, terms, strict=True)
            ]
        return dict(zip(TERMS, sums, strict=True))


def render_chain(
    config: RunConfig,
    objective: Objective,
    unet: nn.Module,
    batch: Mapping[str, Tensor],
    keys: Sequence[str],
) -> Tensor:
    """Run the chain on "lq", and return (B, 3, H, W). The noise is a function of (seed, key)."""
    model, dtype = config.model, PRECISIONS[config.train.precision]
    lq, mask = _seen(model, batch["lq"], batch["mask"] if model.fills_holes else None)
    shape = latent_shape(model, batch["hq"])

    def noise(step: int) -> Tensor:
        generators = [seeds.torch_generator(config.train.seed, "validation", key, step) for key in keys]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(
            lq.device
        )

    def network(*inputs: Tensor | None) -> Tensor:
        with autocast(lq.device, dtype):
            return unet(*inputs).float()

    with autocast(lq.device, dtype):
        y0 = objective.first_stage.encode(objective.start(unet, lq)).float()
    schedule = objective.schedule
    denoiser = network_denoiser(
        network, lq, y0, schedule, model.target, mask, model.latent_scaling, model.unet.sees_y0
    )
    x0 = sample(denoiser, y0, schedule, noise)
    with autocast(lq.device, dtype):
        return objective.first_stage.decode(x0)


def lpips_corner(config: RunConfig, step: int) -> tuple[int, int]:
    """Return the first row and column that LPIPS sees in a step, each in [0, loss.lpips_corners), as a
    function of (seed, step).
    """
    row, column = divmod(
        seeds.derive(config.train.seed, "lpips corner", step) % config.loss.lpips_corners**2,
        config.loss.lpips_corners,
    )
    return row, column


def latent_shape(model: ModelConfig, hq: Tensor) -> tuple[int, int, int]:
    """Return (Z, h, w) of the latent of clean pictures (B, H, W, 3)."""
    return (
        model.first_stage.channels,
        hq.shape[1] // model.first_stage.factor,
        hq.shape[2] // model.first_stage.factor,
    )


def part_for(network: nn.Module, weights: Mapping[str, Tensor]) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Return the part of a network that weights are for, and the weights as it takes them: its regression
    network, if they have the tensors of one, else all of it, which may begin with those of one step
    (`resshift.networks.conv_unet.from_one_step`).
    """
    regression: nn.Module | None = getattr(network, "regression", None)
    if regression is not None and weights.keys() == regression.state_dict().keys():
        return regression, weights
    return network, from_one_step(network, weights) if isinstance(network, ConvUNet) else weights


def start_from(learner: Learner, weights: Mapping[str, Tensor]) -> None:
    """Start a run from given weights instead of random ones, in the network and its average; a chain that
    starts from the estimate of a regression network may be given that alone.

    Raises:
        WeightsError: The weights do not fit, or the run has begun.
    """
    if learner.state.step:
        raise WeightsError(f"--init is for the start of a run; this one is at step {learner.state.step}")
    for network in (unwrapped(learner.state.network), learner.state.ema.module):
        load_whole(*part_for(network, weights))
