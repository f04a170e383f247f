"""Networks of other packages: weights of Real-ESRGAN, SPAN, SwinIR, HAT, DAT and others, through spandrel.

spandrel (MIT, the extra `resshift[models]`) knows the architectures and infers their shapes from the weights.
Files are read here, by `resshift.weights`, which runs no code of a pickle.

Refused are models that are not picture in, picture out: other than three channels, inpainting (needs a mask),
faces (need alignment), and models that cut the picture themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resshift.models import WeightsError
from resshift.networks.config import ForeignConfig
from resshift.weights import read_tensors

# Shapes are inferred by counting keys. No network of the field has so many layers in a row, and a file that
# names one more would be built until memory runs out.
_LARGEST_INDEX = 9999
_SHOWN_KEYS = 3
_CONVOLUTIONAL = (nn.Conv2d, nn.ConvTranspose2d, nn.PReLU)


class ForeignNet(nn.Module):
    """A network of spandrel with our range of values.

    Args:
        descriptor: spandrel's description of the model, with the network.
    """

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.network: nn.Module = descriptor.model
        self._descriptor = descriptor

    @property
    def allows_channels_last(self) -> bool:
        """Whether the network is made of convolutions alone; others may reshape maps without copying."""
        holders = (module for module in self.network.modules() if any(True for _ in module.parameters(False)))
        return all(isinstance(module, _CONVOLUTIONAL) for module in holders)

    def forward(self, lq: Tensor) -> Tensor:
        """(n, 3, h, w) in [-1, 1], of any size -> (n, 3, h scale, w scale) in [-1, 1].

        Sides that the network cannot have are extended by reflection and cut off again.
        """
        return self._descriptor((lq + 1) / 2) * 2 - 1


def describe(path: Path) -> ForeignConfig:
    """Tell what model a file of weights is.

    Raises:
        WeightsError: The file is no model, of an unknown architecture, or of a kind that does not run here.
    """
    found = _descriptor(path)
    size = found.size_requirements
    return ForeignConfig(
        architecture=found.architecture.id,
        scale=found.scale,
        size_multiple=size.multiple_of,
        smallest_px=size.minimum,
        tiling=found.tiling.name.lower(),
        supports_half=found.supports_half,
        supports_bfloat16=found.supports_bfloat16,
    )


def load(path: Path, config: ForeignConfig) -> ForeignNet:
    """Build the network of a file with its weights, in evaluation mode on the CPU.

    Args:
        path: File of weights.
        config: What `describe` said of it.

    Raises:
        WeightsError: As in `describe`, or the file is another model by now.
    """
    found = _descriptor(path)
    if (found.architecture.id, found.scale) != (config.architecture, config.scale):
        raise WeightsError(
            f"{path} is {found.architecture.id} x{found.scale}, not {config.architecture} x{config.scale}"
        )
    return ForeignNet(found.eval())


def _descriptor(path: Path) -> Any:
    """Return spandrel's description of a model that maps pictures to pictures."""
    state = read_tensors(path)
    try:
        from spandrel import MAIN_REGISTRY, ImageModelDescriptor, ModelTiling, canonicalize_state_dict
    except ImportError as error:
        raise WeightsError(
            f"{path} may be a model of another package, which needs spandrel: pip install 'resshift[models]'"
        ) from error
    state = canonicalize_state_dict(dict(state))
    _check_sizes(path, state)
    known = MAIN_REGISTRY.architectures("detection")
    support = next((one for one in known if one.detect(state)), None)
    if support is None:
        raise WeightsError(
            f"{path} is of no architecture that spandrel knows; its keys look like {_keys(state)}"
        )
    name = support.architecture.name
    try:
        found = support.architecture.load(state)
    except Exception as error:  # of whatever kind: shapes of strangers meet code of strangers
        line = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{path} looks like {name}, but its weights do not fit ({type(error).__name__}: {line})"
        ) from error
    if not isinstance(found, ImageModelDescriptor):
        raise WeightsError(f"{path} ({name}) fills holes and needs a mask, which is not supported")
    if found.purpose == "FaceSR":
        raise WeightsError(f"{path} ({name}) restores aligned faces, not pictures, which is not supported")
    if (found.input_channels, found.output_channels) != (3, 3):
        raise WeightsError(
            f"{path} ({name}) maps {found.input_channels} channels to {found.output_channels}: a model must "
            "map 3 to 3 (RGB)"
        )
    if found.tiling == ModelTiling.INTERNAL:
        raise WeightsError(f"{path} ({name}) cuts pictures into tiles itself, which is not supported")
    return found


def _check_sizes(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a small file that asks for a huge network, by a key or by a tensor that repeats one number."""
    for key in state:
        if any(int(part) > _LARGEST_INDEX for part in re.findall(r"\d{1,18}", key)):
            raise WeightsError(f"{path} is no model: it has a key {key[:80]!r}")
    num_values, size_bytes = sum(tensor.numel() for tensor in state.values()), path.stat().st_size
    if num_values > size_bytes:
        raise WeightsError(f"{path} is no model: its tensors have {num_values} values in {size_bytes} bytes")


def _keys(state: Mapping[str, Tensor]) -> str:
    keys = list(state)
    return ", ".join(key[:80] for key in keys[:_SHOWN_KEYS]) + (", ..." if len(keys) > _SHOWN_KEYS else "")
