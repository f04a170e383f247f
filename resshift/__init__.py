"""ResShift: super-resolution by residual shifting.

from resshift import Upscaler
up = Upscaler.from_pretrained("tiny-x4")
out = up(image)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resshift.client import Client
    from resshift.upscaler import Upscaler

__all__ = ["Client", "Upscaler"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Imported on first use: `import resshift.storage` should not have to wait for torch.
    if name == "Upscaler":
        from resshift.upscaler import Upscaler

        return Upscaler
    if name == "Client":
        from resshift.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
