"""LPIPS, a learned perceptual distance (Zhang et al., CVPR 2018): a metric of evaluation, and a term of the
training objective.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from resshift.models import local_file


class Lpips(nn.Module):
    """Learned perceptual distance with frozen weights, always in float32.

    Args:
        net: Trunk, "vgg" (training loss of the papers), "alex" (metric of the papers) or "squeeze" (small).
        trunk: File with the torchvision state dict of the trunk (a path, file://, s3:// or
            hf://OWNER/NAME/FILE); None downloads it with torchvision.

    Raises:
        FileNotFoundError: `trunk` does not exist.
        ConnectionError: No `trunk` was given and the download failed.
        ImportError: The package lpips is not installed.
    """

    def __init__(self, net: str = "vgg", trunk: str | Path | None = None) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise ImportError(
                "the LPIPS term needs the package lpips: pip install 'resshift[metrics]'"
            ) from error
        path = None if trunk is None else local_file(trunk)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"no LPIPS trunk at {trunk}")
        try:
            with warnings.catch_warnings():  # it calls torchvision in a way of before
                warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
                self.distance = lpips.LPIPS(net=net, pnet_rand=path is not None, verbose=False)
        except (URLError, OSError) as error:
            raise ConnectionError(
                f"the {net} trunk of LPIPS could not be downloaded ({error}). Give a file with its weights "
                "(loss.lpips_trunk or --lpips-trunk), or train without the term (loss.lpips=0)"
            ) from error
        if path is not None:
            self._load_trunk(path)
        self.eval().requires_grad_(False)

    def _load_trunk(self, path: Path) -> None:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        ours = self.distance.net.state_dict()
        # lpips cuts the trunk into slices and keeps the index of each layer: slice2.3.weight is
        # features.3.weight in torchvision.
        names = {key: "features." + key.split(".", 1)[1] for key in ours}
        missing = [
            name for key, name in names.items() if name not in state or state[name].shape != ours[key].shape
        ]
        if missing:
            raise ValueError(
                f"{path} does not hold the weights of this trunk; missing or of another shape: "
                f"{', '.join(missing[:5])}"
            )
        self.distance.net.load_state_dict(
            {key: state[name].float() for key, name in names.items()}, strict=True
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair: twice (B, 3, H, W) in [-1, 1] -> (B,) float32."""
        with torch.autocast(x.device.type, enabled=False):
            x, y = (picture.float().contiguous(memory_format=torch.channels_last) for picture in (x, y))
            return self.distance(x, y).flatten()

    def at_pixels(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance at every pixel, (B, H, W) float32: the maps of the layers, enlarged to the size
        of the picture and added.
        """
        self.distance.spatial = True
        try:
            return self.distance(x.float(), y.float())[:, 0]
        finally:
            self.distance.spatial = False
