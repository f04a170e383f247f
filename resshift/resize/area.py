"""Resizing by averages: each output pixel is the mean of the input pixels that it covers.

Two definitions are in use; with s = in / out, output pixel i is one of

    covered   the mean over the interval [i s, (i + 1) s), in which partly covered pixels count in proportion
              (cv2.INTER_AREA)
    touched   the plain mean of all pixels that the interval touches
              (adaptive average pooling, F.interpolate(mode="area"))

Both are products of a row and a column average, so a picture is resized by weighted sums of its rows, twice.
This is two to five times as fast as either library.
"""

from __future__ import annotations

import functools
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rule = Literal["covered", "touched"]
Pixel = TypeVar("Pixel", np.float32, np.uint8)


def area_resize(image: NDArray[Pixel], height: int, width: int, rule: Rule) -> NDArray[Pixel]:
    """Resize an (H, W, 3) picture to (height, width, 3) by averages.

    Args:
        image: Picture, float32 of any range or uint8; it need not be contiguous.
        height, width: Size of the result.
        rule: One of the two definitions above.

    Returns:
        A picture of the dtype of `image`; averages of 8-bit pixels are rounded half to even.
    """
    rows = _averaged(np.ascontiguousarray(image, dtype=np.float32), height, rule)
    columns = _averaged(np.asarray(cv2.transpose(rows), dtype=np.float32), width, rule)
    # Rounded before it is transposed: it is in the cache now, and pixels of 3 bytes are transposed faster.
    turned = cv2.convertScaleAbs(columns) if image.dtype == np.uint8 else columns
    return np.asarray(cv2.transpose(turned), dtype=image.dtype)


def _averaged(image: NDArray[np.float32], num_out: int, rule: Rule) -> NDArray[np.float32]:
    """Average along the first axis."""
    num_in, other, channels = image.shape
    if num_in == num_out:
        return image
    taps, starts, weights = _taps(num_in, num_out, rule)
    rows = torch.from_numpy(image.reshape(num_in, other * channels))
    # F.embedding_bag(mode="sum") calls this; its checks take as long as the sums of a small picture.
    sums = torch.embedding_bag(rows, taps, starts, False, 0, False, weights)[0]
    return sums.numpy().reshape(num_out, other, channels)


# A small cache: long-lived tensors between short-lived images fragment the heap (glibc before 2.38 allocates
# torch's aligned memory around them). With 4096 entries a process that makes pairs grew by 600 MB in 4,800
# pairs, nearly all of it free memory.
@functools.lru_cache(maxsize=64)
def _taps(num_in: int, num_out: int, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input indices of all outputs, one output after another, the position at which the indices of
    each output start, and their weights, whose sum is 1 for each output.
    """
    i_out = np.arange(num_out, dtype=np.int64)[:, None]
    first, end = i_out * num_in // num_out, -(-(i_out + 1) * num_in // num_out)
    taps = first + np.arange(int((end - first).max()))
    if rule == "touched":
        weights = (taps < end) / (end - first)
    else:
        # In units of 1 / num_out of an input pixel all lengths are integers.
        covered = np.minimum((taps + 1) * num_out, (i_out + 1) * num_in) - np.maximum(
            taps * num_out, i_out * num_in
        )
        weights = np.maximum(covered, 0) / num_in
    taps, weights = np.minimum(taps, num_in - 1).ravel(), weights.astype(np.float32).ravel()
    starts = np.arange(num_out, dtype=np.int64) * (taps.size // num_out)
    return torch.from_numpy(taps), torch.from_numpy(starts), torch.from_numpy(weights)
