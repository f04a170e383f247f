"""Training of a VQ autoencoder, the first stage of the released models, on the machinery of
`resshift.training.step`.

    z = E(x),  z_q = nearest codes,  x_rec = D(z + stop(z_q - z))

    reconstruction   l1 |x - x_rec| + lpips LPIPS(x_rec, x)
    codebook         |z_q - stop(z)|^2 + commitment |z - stop(z_q)|^2
    adversarial      -mean C(x_rec),  from step `adversarial_start` on, with the adaptive weight
                     |grad reconstruction| / (|grad adversarial| + 1e-4), at most 1e4;
                     gradients are those of the last layer of D
    total            reconstruction + codebook_weight codebook + adversarial_weight adaptive adversarial
    discriminator    hinge loss of C on x and stop(x_rec)

(Esser et al., "Taming Transformers", CVPR 2021; Rombach et al., "High-Resolution Image Synthesis with Latent
Diffusion Models", CVPR 2022.) Both networks are trained on the same reconstruction. The adaptive weight is
computed for each micro-batch, so with the adversarial term the size of micro-batches changes results by more
than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from resshift import seeds
from resshift.config import (
    STRICT,
    ConfigError,
    DataConfig,
    LogConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    ValidationConfig,
)
from resshift.degradation import DegradationRecipe
from resshift.devices import PRECISIONS, autocast, on_device
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import VQAutoencoder
from resshift.networks.config import FirstStageConfig, VQConfig
from resshift.networks.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss
from resshift.presets import VQ_F8_FACE
from resshift.training.optimizer import Outcome, guarded_step, run_learning_rate, set_learning_rate
from resshift.training.sharding import synchronise_gradients
from resshift.training.slots import Slots
from resshift.training.step import (
    StepResult,
    build_state,
    seeded,
    shares,
    to_unit_range,
    unwrapped,
)

TERMS: tuple[str, ...] = ("loss", "l1", "lpips", "codebook", "adversarial", "adaptive", "discriminator")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class AutoencoderLossConfig:
    """Weights of the terms in the module docstring, none below 0.

    Fields:
        l1, lpips: Weights of the distances of pixels and of features, not both 0.
        lpips_net: Trunk of LPIPS.
        lpips_trunk: File with the weights of the trunk; null downloads them with torchvision.
        codebook, commitment: Weights of the two terms of quantisation.
        adversarial: Weight of the adversary.
        adversarial_start: Step at which it begins.
    """

    l1: float = 1.0
    lpips: float = 1.0
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    lpips_trunk: str | None = None
    codebook: float = 1.0
    commitment: float = 0.25
    adversarial: float = 0.75
    adversarial_start: int = 10_000
    discriminator: DiscriminatorConfig = DiscriminatorConfig()

    def __post_init__(self) -> None:
        values = {
            name: getattr(self, name)
            for name in ("l1", "lpips", "codebook", "commitment", "adversarial", "adversarial_start")
        }
        if min(values.values()) < 0 or self.l1 + self.lpips == 0:
            raise ValueError(
                f"weights of loss must not be negative, and l1 and lpips not both zero, got {values}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class AutoencoderRunConfig:
    """Configuration of a run of `jobs/train_autoencoder.py`. `optim` applies to both networks.

    Fields:
        preset: Name of the preset that it began as.
    """

    preset: str
    first_stage: FirstStageConfig = FirstStageConfig()
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()

    def __post_init__(self) -> None:
        if self.first_stage.kind != "vq":
            raise ValueError(f"first_stage.kind must be vq: {self.first_stage.kind} has nothing to learn")
        if self.optim.muon:
            raise ValueError(f"optim.muon is for runs with stages, got {self.optim.muon}")
        if self.data.crop_px % self.first_stage.factor:
            raise ValueError(
                f"data.crop_px must be a multiple of {self.first_stage.factor}, got {self.data.crop_px}"
            )
        if (
            self.train.parallel != "ddp"
            or self.train.precision == "fp16"
            or self.train.activation_checkpointing
        ):
            # The adaptive weight needs the whole, unscaled gradient of the last layer in the middle of a
            # step.
            raise ValueError(
                "an autoencoder trains with train.parallel=ddp, precision fp32 or bf16 and without "
                "activation_checkpointing"
            )

    @property
    def degradation(self) -> DegradationRecipe:
        """Degradation of the pairs: none, as the autoencoder sees clean pictures only."""
        return DegradationRecipe(kind="bicubic", scale=1)


AnyRunConfig = RunConfig | AutoencoderRunConfig
"""Configuration of a run of either network, U-Net or autoencoder."""


def vq_f4() -> AutoencoderRunConfig:
    """Return VQ-f4 of latent diffusion (Rombach et al. 2022): 55.3 M parameters, 3 x 64 x 64 latents of
    256-pixel crops, 8192 codes.

    Objective and weights (LPIPS 1, codebook 1, commitment 0.25, adversarial 0.75 adaptive, hinge), betas
    (0.5, 0.9) and a learning rate of 4.5e-6 for each sample of the batch are those of the paper. Warm-up, the
    average of the weights, bf16, and the start of the discriminator at step 10,000, when reconstructions are
    good enough to judge, are additions.
    """
    return AutoencoderRunConfig(
        preset="vq-f4",
        optim=OptimConfig(lr=4.5e-6 * 64, lr_end=4.5e-6, betas=(0.5, 0.9), warmup_steps=1000),
        data=DataConfig(crop="random", crop_px=256),
        train=TrainConfig(
            steps=400_000, batch_size=64, micro_batch=8, precision="bf16", checkpoint_every=10_000
        ),
    )


def vq_f8_face() -> AutoencoderRunConfig:
    """Return VQ-f8 for 512-pixel faces, the first stage of face-s4: 8 x 64 x 64 latents, 4096 codes. It is
    trained as vq-f4.
    """
    base = vq_f4()
    return replace(
        base,
        preset="vq-f8-face",
        first_stage=FirstStageConfig(vq=VQ_F8_FACE),
        data=DataConfig(crop="short_side", crop_px=512),
        optim=replace(base.optim, lr=4.5e-6 * 32),
        train=replace(base.train, batch_size=32, micro_batch=4),
    )


def test_vq() -> AutoencoderRunConfig:
    """Return a small autoencoder of the same construction for tests: 32-pixel crops, steps of tens of
    milliseconds.
    """
    base = vq_f4()
    return replace(
        base,
        preset="test-vq",
        first_stage=FirstStageConfig(vq=VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=64)),
        loss=AutoencoderLossConfig(
            lpips=0.0, adversarial_start=4, discriminator=DiscriminatorConfig(channels=16, layers=2)
        ),
        optim=replace(base.optim, lr=1e-3, warmup_steps=0),
        data=DataConfig(crop="random", crop_px=32),
        train=TrainConfig(steps=20, batch_size=8, micro_batch=4, checkpoint_every=10, log_every=5),
    )


AUTOENCODER_PRESETS: dict[str, Callable[[], AutoencoderRunConfig]] = {
    "vq-f4": vq_f4,
    "vq-f8-face": vq_f8_face,
    "test-vq": test_vq,
}


def autoencoder_preset(name: str) -> AutoencoderRunConfig:
    """Return the configuration called `name`.

    Raises:
        ConfigError: There is no such preset; the message lists the presets.
    """
    if name not in AUTOENCODER_PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(AUTOENCODER_PRESETS)}")
    return AUTOENCODER_PRESETS[name]()


class TrainableAutoencoder(VQAutoencoder):
    """The autoencoder, with a forward pass for training; its keys are the same."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) -> reconstruction (B, 3, H, W); latent z and its codes z_q, (B, embed_dim, h, w)."""
        z = self.encode(x)
        z_q = self.quantize.embedding(self.quantize.nearest(z.detach())).movedim(-1, 1).to(z.dtype)
        return self.decode(z + (z_q - z).detach(), quantize=False), z, z_q


def build_autoencoder(config: AutoencoderRunConfig, device: torch.device) -> TrainableAutoencoder:
    """Return the autoencoder with initial weights that depend only on the seed of the run."""
    vq: VQConfig = config.first_stage.vq
    autoencoder = seeded(TrainableAutoencoder, vq, config.train)
    _spread_codes(autoencoder, seeds.torch_generator(config.train.seed, "codes"))
    return on_device(autoencoder, device, config.train.channels_last)


@torch.no_grad()
def _spread_codes(autoencoder: TrainableAutoencoder, generator: torch.Generator) -> None:
    """Take latents of soft patches of random colours as codes.

    Codes between -1/n and 1/n, with which the released models began, are one point beside the latents of an
    untrained encoder. Then a few codes are the nearest of all latents, and the others are never trained.
    """
    codes = autoencoder.quantize.embedding.weight
    latent_side, number = 16, -(-len(codes) // 16**2)
    patches = torch.rand((number, 3, latent_side // 2, latent_side // 2), generator=generator) * 2 - 1
    side = latent_side * autoencoder.factor
    pictures = F.interpolate(patches, (side, side), mode="bicubic").clamp(-1, 1)
    latents = autoencoder.encode(pictures).movedim(1, -1).flatten(0, 2)
    codes.copy_(latents[torch.randperm(len(latents), generator=generator)[: len(codes)]])


class AutoencoderLearner:
    """Autoencoder and discriminator of a run.

    Args:
        config: Configuration of the run.
        autoencoder: Autoencoder on its device, not wrapped.
        lpips: LPIPS network on the same device; required if `loss.lpips` is not zero.
        slots: Slots of this worker; None if there is one worker.
    """

    def __init__(
        self,
        config: AutoencoderRunConfig,
        autoencoder: TrainableAutoencoder,
        lpips: Lpips | None = None,
        slots: Slots | None = None,
    ) -> None:
        if config.loss.lpips and lpips is None:
            raise ValueError(f"loss.lpips is {config.loss.lpips} but no LPIPS network was given")
        self.config = config
        self.lpips = lpips
        self.slots = slots or Slots.of_rank(config.train.batch_size)
        device = next(autoencoder.parameters()).device
        discriminator = seeded(PatchDiscriminator, config.loss.discriminator, config.train, "discriminator")
        discriminator = on_device(discriminator, device, config.train.channels_last)
        networks = {"model": (autoencoder, config.optim), "discriminator": (discriminator, config.optim)}
        self.state = build_state(
            config.train,
            cast(dict[str, tuple[nn.Module, OptimConfig]], networks),
            TERMS,
            self.slots.num_ranks,
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of both networks in a step."""
        return run_learning_rate(step, self.config.optim, self.config.train)

    @property
    def judged(self) -> bool:
        """Whether the adversarial term is on."""
        return self.config.loss.adversarial > 0 and self.state.step >= self.config.loss.adversarial_start

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run one optimiser step of both networks on "hq" (B, H, W, 3) uint8, the samples of this worker's
        slots.
        """
        state, train = self.state, self.config.train
        for optimizer in state.optimizers.values():
            set_learning_rate(optimizer, self.learning_rate(state.step))
        for network in state.networks.values():
            network.train()
        device = batch["hq"].device
        sums = dict.fromkeys(TERMS, torch.zeros((), device=device))
        for part, factor in shares(state.network, self.slots, train.micro_batch):
            synchronise_gradients(
                state.networks["discriminator"], part.stop == self.slots.stop - self.slots.start
            )
            x = to_unit_range(batch["hq"][part])
            for name, term in self._backward(x, factor).items():
                sums[name] = sums[name] + term.detach() * (factor / self.slots.num_ranks)
        outcomes = [
            guarded_step(state.optimizers[name], self.config.optim.clip_norm, state.scaler)
            for name in state.networks
            if name == "model" or self.judged
        ]
        state.ema.update(unwrapped(state.network))
        state.step += 1
        return StepResult(
            sums, Outcome(outcomes[0].grad_norm, torch.stack([outcome.finite for outcome in outcomes]).all())
        )

    def _backward(self, x: Tensor, factor: float) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch to both networks, and return its terms."""
        loss, dtype = self.config.loss, PRECISIONS[self.config.train.precision]
        discriminator = self.state.networks["discriminator"]
        with autocast(x.device, dtype):
            x_rec, z, z_q = self.state.network(x)
            l1 = F.l1_loss(x_rec.float(), x)
            lpips = (
                self.lpips(x_rec, x).mean() if self.lpips is not None and loss.lpips else torch.zeros_like(l1)
            )
            codebook = F.mse_loss(z_q.float(), z.detach().float()) + loss.commitment * F.mse_loss(
                z.float(), z_q.detach().float()
            )
            reconstruction = loss.l1 * l1 + loss.lpips * lpips
            adversarial = adaptive = judgement = torch.zeros_like(l1)
            if self.judged:
                # The network is unwrapped and frozen: only the gradient of the picture is needed.
                judge = unwrapped(discriminator).requires_grad_(False)
                adversarial = -judge(x_rec).float().mean()
                judge.requires_grad_(True)
                adaptive = adaptive_weight(reconstruction, adversarial, self._last_layer())
            total = reconstruction + loss.codebook * codebook + loss.adversarial * adaptive * adversarial
        (total * factor).backward()
        if self.judged:
            with autocast(x.device, dtype):
                real, fake = discriminator(torch.cat([x, x_rec.detach().to(x.dtype)])).float().chunk(2)
                judgement = hinge_loss(real, fake)
            (judgement * factor).backward()
        return dict(zip(TERMS, (total, l1, lpips, codebook, adversarial, adaptive, judgement), strict=True))

    def _last_layer(self) -> nn.Parameter:
        return cast(TrainableAutoencoder, unwrapped(self.state.network)).decoder.conv_out.weight  # type: ignore[return-value]

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return the reconstruction of "hq" by the averaged weights, (B, 3, H, W)."""
        autoencoder = cast(TrainableAutoencoder, self.state.ema.module)
        with autocast(batch["hq"].device, PRECISIONS[self.config.train.precision]):
            return autoencoder.decode(autoencoder.encode(to_unit_range(batch["hq"])))


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Return |d reconstruction / d w| / (|d adversarial / d w| + 1e-4), at most 1e4 and without a gradient,
    where w is the weight of the last layer.
    """
    (towards_picture,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (towards_judge,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (towards_picture.norm() / (towards_judge.norm() + 1e-4)).clamp(max=1e4).detach()
