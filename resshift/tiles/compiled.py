"""Networks through `torch.compile`, with the eager ones to fall back on.

On CUDA the mode is "reduce-overhead": kernels of normalisation and activation are fused, and a stage on tiles
of one shape is replayed as a CUDA graph. Tiles and batches have one shape a picture, so a handful of shapes
is compiled and kept. Compiling takes minutes the first time and needs a C compiler on CPUs and Triton on
CUDA; where anything of this fails, the eager network runs and a warning says why.

It is not the default: it rounds differently, and its gain is not measured on CUDA yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resshift.tiles.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class Compiled:
    """A function of tensors that is compiled at its first call.

    Args:
        function: the eager one.
        name: for the warning.
        device: that it runs on; chooses the mode.
        backend: of `torch.compile`.
    """

    def __init__(
        self, function: Callable[..., Tensor], name: str, device: torch.device, backend: str = "inductor"
    ) -> None:
        self.function, self.name = function, name
        mode = "reduce-overhead" if device.type == "cuda" and backend == "inductor" else None
        self._compiled: Callable[..., Tensor] | None = torch.compile(
            function, dynamic=False, backend=backend, mode=mode
        )

    def __call__(self, *args: Tensor | None) -> Tensor:
        """Return function(*args).

        Raises:
            Exception: memory has run out; what else goes wrong in the compiler or its kernels turns compiling
                off.
        """
        if self._compiled is None:
            return self.function(*args)
        try:
            # A graph writes to the same memory at each replay.
            return self._compiled(*args).clone()
        except Exception as error:  # the compiler, Triton and the C compiler each have types of their own
            if is_out_of_memory(error):
                raise
            logger.warning(
                "%s runs uncompiled: %s: %s",
                self.name,
                type(error).__name__,
                str(error).strip().split("\n")[0][:200],
            )
            self._compiled = None
            return self.function(*args)


@dataclass
class CompiledStage:
    """A first stage whose two directions are compiled."""

    factor: int
    channels: int
    encode: Callable[..., Tensor]
    decode: Callable[..., Tensor]
