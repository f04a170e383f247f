"""What a network of the chain is trained to say."""

from __future__ import annotations

from enum import StrEnum


class Target(StrEnum):
    """What the network's output means. Released weights predict x0; their configurations spell it `xstart`,
    which is accepted.
    """

    X0 = "x0"
    RESIDUAL = "residual"
    EPSILON = "epsilon"
    EPSILON_SCALE = "epsilon_scale"

    @classmethod
    def _missing_(cls, value: object) -> Target | None:
        return cls.X0 if value == "xstart" else None
