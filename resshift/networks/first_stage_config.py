"""The shape of a first stage, apart from the networks: who only describes a model reads it without importing
torch.
"""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class VQConfig:
    """Shape of a VQ autoencoder. The defaults are VQ-f4 (55,322,782 parameters)."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 2
    z_channels: int = 3
    embed_dim: int = 3
    n_embed: int = 8192

    def __post_init__(self) -> None:
        if self.ch % 32:
            raise ValueError(
                f"first_stage.vq.ch must be a multiple of 32 (GroupNorm has 32 groups), got {self.ch}"
            )
        if not isinstance(self.num_res_blocks, int) and len(self.num_res_blocks) != len(self.ch_mult):
            raise ValueError(
                f"first_stage.vq.num_res_blocks must be one number or {len(self.ch_mult)}, got "
                f"{self.num_res_blocks}"
            )

    @property
    def res_blocks(self) -> tuple[int, ...]:
        """Number of residual blocks of each level."""
        return (
            (self.num_res_blocks,) * len(self.ch_mult)
            if isinstance(self.num_res_blocks, int)
            else self.num_res_blocks
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FirstStageConfig:
    """Which first stage: a VQ autoencoder of shape `vq`, or pixel-unshuffle by `unshuffle_factor`. The other
    field is ignored.
    """

    kind: Literal["vq", "pixel_unshuffle"] = "vq"
    vq: VQConfig = VQConfig()
    unshuffle_factor: int = 4

    def __post_init__(self) -> None:
        if self.unshuffle_factor < 1:
            raise ValueError(f"first_stage.unshuffle_factor must be at least 1, got {self.unshuffle_factor}")

    @property
    def factor(self) -> int:
        """f: pixels a side of one latent position."""
        return 2 ** (len(self.vq.ch_mult) - 1) if self.kind == "vq" else self.unshuffle_factor

    @property
    def channels(self) -> int:
        """Z: latent channels."""
        return self.vq.embed_dim if self.kind == "vq" else 3 * self.unshuffle_factor**2
