"""The shifting sequence eta_1 < ... < eta_T, the quantities that follow from it, and what a network predicts.

    sqrt(eta_t) = sqrt(eta_1) * b0 ** beta_t
    beta_t      = ((t - 1) / (T - 1)) ** p * (T - 1)
    b0          = exp(log(eta_T / eta_1) / (2 (T - 1)))
    alpha_t     = eta_t - eta_{t-1},  eta_0 = 0

(Yue, Wang and Loy, "ResShift", NeurIPS 2023), which is the same as
`sqrt(eta_t) = sqrt(eta_1) * (sqrt(eta_T) / sqrt(eta_1)) ** (((t - 1) / (T - 1)) ** p)`.

Indices: every array has length T, and entry i belongs to t = i + 1 in the paper. The network receives i.

Names that contain `sqrt_` are roots, and no other names are. (The released code calls sqrt(eta_T) `etas_end`:
its 0.99 is a root, so eta_T = 0.9801 there and 0.999 in the paper. Released weights need the released form.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as config_dataclass

Float64Array = NDArray[np.float64]


class Target(StrEnum):
    """What the network's output means at a step; `resshift.diffusion.predict_x0` has the equations. Released
    weights predict x0; their configurations spell it `xstart`, which is accepted.
    """

    X0 = "x0"
    RESIDUAL = "residual"
    EPSILON = "epsilon"
    EPSILON_SCALE = "epsilon_scale"

    @classmethod
    def _missing_(cls, value: object) -> Target | None:
        return cls.X0 if value == "xstart" else None


class Sampler(StrEnum):
    """Form of a reverse step (`resshift.sampler.reverse_step`): a draw from the posterior, which is the
    method's own, or that of DDIM, which draws no noise after x_T. With one step they are the same.
    """

    POSTERIOR = "posterior"
    DDIM = "ddim"


@config_dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class ScheduleConfig:
    """Parameters of the shifting sequence of a model.

    Fields:
        form: The sequence of the released code, or that of the paper.
        steps: T, the number of steps of the chain, at least 1.
        kappa: Strength of the noise. 0 is none, which is for a released form of one step: x_T is y0.
        power: p, how late eta grows, above 0.
        min_noise: Deviation of the noise at the first step, kappa sqrt(eta_1), above 0; released form only.
        sqrt_eta_end: Root of eta_T, in (0, 1]; released form only.
        trained_steps: Length of the sequence that the network was trained with if the chain has fewer `steps`
            (`ShiftSchedule.shortened`), as for a one-step student of a chain of 15; null if it has as many.
    """

    form: Literal["released", "paper"] = "released"
    steps: int = 4
    kappa: float = 2.0
    power: float = 0.3
    min_noise: float = 0.2
    sqrt_eta_end: float = 0.99
    trained_steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"schedule.steps must be at least 1, got {self.steps}")
        if self.trained_steps is not None and self.trained_steps < self.steps:
            raise ValueError(
                f"schedule.trained_steps must be at least schedule.steps = {self.steps}, got "
                f"{self.trained_steps}"
            )
        for name in ("power", "min_noise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"schedule.{name} must be positive, got {getattr(self, name)}")
        may_be_zero = self.steps == 1 and self.trained_steps is None and self.form == "released"
        if not (self.kappa > 0 or (self.kappa == 0 and may_be_zero)):
            raise ValueError(
                "schedule.kappa must be positive, or 0 with schedule.form=released and steps=1, got "
                f"{self.kappa}"
            )
        if not 0 < self.sqrt_eta_end <= 1:
            raise ValueError(f"schedule.sqrt_eta_end must lie in (0, 1], got {self.sqrt_eta_end}")


@dataclass(frozen=True, eq=False, slots=True)
class ShiftSchedule:
    """A shifting sequence with its posterior coefficients, all float64 of length T.

        q(x_t | x0, y0)          = N(x0 + eta_t (y0 - x0), kappa^2 eta_t I)
        q(x_{t-1} | x_t, x0, y0) = N((eta_{t-1} / eta_t) x_t + (alpha_t / eta_t) x0,
                                     kappa^2 (eta_{t-1} / eta_t) alpha_t I)

    Fields:
        sqrt_eta: Increasing values in (0, 1], shape (T,).
        kappa: Noise level at eta = 1, in units of the latent; 0 is no noise.
        trained_steps: Indices of the entries in the sequence that the network was trained with, shape (T,);
            None is 0 ... T - 1. See `shortened`.
    """

    sqrt_eta: Float64Array
    kappa: float
    trained_steps: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.sqrt_eta.ndim != 1 or not len(self.sqrt_eta):
            raise ValueError(f"sqrt_eta must be a non-empty vector, got shape {self.sqrt_eta.shape}")
        if self.sqrt_eta[0] <= 0 or self.sqrt_eta[-1] > 1 or np.any(np.diff(self.sqrt_eta) <= 0):
            raise ValueError(f"sqrt_eta must increase strictly within (0, 1], got {self.sqrt_eta.tolist()}")
        self.sqrt_eta.setflags(write=False)

    @classmethod
    def released(
        cls,
        steps: int = 4,
        kappa: float = 2.0,
        min_noise: float = 0.2,
        power: float = 0.3,
        sqrt_eta_end: float = 0.99,
    ) -> ShiftSchedule:
        """Return the sequence of the released weights: sqrt(eta_1) = min(min_noise / kappa, min_noise),
        sqrt(eta_T) = sqrt_eta_end.
        """
        start = min_noise / max(kappa, 1.0)
        return cls(_powered_curve(start, sqrt_eta_end, steps, power), kappa)

    @classmethod
    def paper(cls, steps: int = 15, kappa: float = 2.0, power: float = 0.3) -> ShiftSchedule:
        """Return the sequence of the paper: eta_1 = min((0.04 / kappa)^2, 0.001), eta_T = 0.999."""
        return cls(
            _powered_curve(np.sqrt(min((0.04 / kappa) ** 2, 0.001)), np.sqrt(0.999), steps, power), kappa
        )

    @classmethod
    def from_config(cls, config: ScheduleConfig) -> ShiftSchedule:
        """Return the sequence of a configuration."""
        steps = config.trained_steps or config.steps
        trained = (
            cls.paper(steps, config.kappa, config.power)
            if config.form == "paper"
            else cls.released(steps, config.kappa, config.min_noise, config.power, config.sqrt_eta_end)
        )
        return trained.shortened(config.steps)

    def shortened(self, steps: int) -> ShiftSchedule:
        """Return a chain of fewer steps through some of these etas, for the same network.

        The indices ceil(T k / S) - 1 for k = 1 ... S are kept, and so always the last: the chain begins at
        the prior, y0 + kappa sqrt(eta_T) noise, which the network was trained on. (The respacing of the
        released code drops the last.) Posteriors follow from the kept etas alone.

        Raises:
            ValueError: `steps` lies outside 1 ... T.
        """
        if not 1 <= steps <= self.steps:
            raise ValueError(f"steps must lie in 1 to {self.steps} for this model, got {steps}")
        if steps == self.steps:
            return self
        kept = -(-self.steps * np.arange(1, steps + 1) // steps) - 1
        known = np.arange(self.steps) if self.trained_steps is None else self.trained_steps
        return ShiftSchedule(self.sqrt_eta[kept].copy(), self.kappa, known[kept])

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.sqrt_eta)

    @property
    def eta(self) -> Float64Array:
        """eta_t."""
        return self.sqrt_eta**2

    @property
    def eta_prev(self) -> Float64Array:
        """eta_{t-1}, with eta_0 = 0."""
        return np.concatenate([[0.0], self.eta[:-1]])

    @property
    def alpha(self) -> Float64Array:
        """alpha_t = eta_t - eta_{t-1}."""
        return self.eta - self.eta_prev

    @property
    def noise_std(self) -> Float64Array:
        """kappa sqrt(eta_t), the standard deviation of the noise in x_t."""
        return self.kappa * self.sqrt_eta

    @property
    def latent_input_std(self) -> Float64Array:
        """sqrt(1 + kappa^2 eta_t), the standard deviation of x_t when the latent has unit variance."""
        return np.sqrt(1 + self.noise_std**2)

    @property
    def pixel_input_range(self) -> Float64Array:
        """1 + 3 kappa sqrt(eta_t), the range of [-1, 1] plus three standard deviations of the noise."""
        return 1 + 3 * self.noise_std

    @property
    def posterior_coef_xt(self) -> Float64Array:
        """eta_{t-1} / eta_t, the weight of x_t in the posterior mean."""
        return self.eta_prev / self.eta

    @property
    def posterior_coef_x0(self) -> Float64Array:
        """alpha_t / eta_t, the weight of x0 in the posterior mean."""
        return self.alpha / self.eta

    @property
    def posterior_variance(self) -> Float64Array:
        """kappa^2 (eta_{t-1} / eta_t) alpha_t; zero at t = 1, so the last step returns x0 exactly."""
        return self.kappa**2 * self.posterior_coef_xt * self.alpha

    @property
    def ddim_coef_xt(self) -> Float64Array:
        """sqrt(eta_{t-1} / eta_t), the weight of x_t in a step without noise."""
        return np.sqrt(self.posterior_coef_xt)

    @property
    def ddim_coef_y0(self) -> Float64Array:
        """eta_{t-1} - sqrt(eta_{t-1} eta_t), the weight of y0 in a step without noise."""
        return self.eta_prev - np.sqrt(self.eta_prev * self.eta)

    @property
    def ddim_coef_x0(self) -> Float64Array:
        """The weight of x0 in a step without noise; the three sum to 1."""
        return 1 - self.ddim_coef_xt - self.ddim_coef_y0


def _powered_curve(sqrt_eta_1: float, sqrt_eta_end: float, steps: int, power: float) -> Float64Array:
    if steps == 1:
        # The formula divides by T - 1. One step goes from eta_T to x0, so the curve is its end.
        return np.array([sqrt_eta_end], dtype=np.float64)
    fraction = np.arange(steps, dtype=np.float64) / (steps - 1)
    return sqrt_eta_1 * (sqrt_eta_end / sqrt_eta_1) ** (fraction**power)
