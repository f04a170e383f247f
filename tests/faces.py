"""Faces whose place is known: a detector's file that takes red cells of 8 px for faces, photos with such
cells, and a model that makes every face grey.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from resshift.faces.align import TEMPLATE, soft_mask
from resshift.networks.config import ForeignConfig
from resshift.upscaler import Upscaler

CELL_PX, SQUARE_PX, GREY = 8, 64, 77
_OUTPUTS = {"cls": 1, "obj": 1, "bbox": 4, "kps": 10}
_STRIDES = (8, 16, 32)


def write_detector(path: Path) -> str:
    """Write the file: the outputs of YuNet, where the score of a cell is its red minus its green, and the
    landmarks are those of a face whose square has 64 px, the cell in the middle. Returns the path.
    """
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for stride in _STRIDES:
        for name, channels in _OUTPUTS.items():
            out = f"{name}_{stride}"
            kernel = np.zeros((channels, 3, stride, stride), np.float32)
            bias = np.zeros(channels, np.float32)
            if stride == CELL_PX and channels == 1:
                kernel[0, 2], kernel[0, 1] = 1 / (64 * 255), -1 / (64 * 255)  # the input is BGR
            if name == "kps":
                bias[:] = ((TEMPLATE * SQUARE_PX / 512 - SQUARE_PX / 2) / stride).reshape(-1)
            shape = np.array([1, -1, channels])
            constants += [
                numpy_helper.from_array(value, f"{out}.{what}")
                for what, value in (("kernel", kernel), ("bias", bias), ("shape", shape))
            ]
            nodes += [
                helper.make_node(
                    "Conv",
                    ["input", f"{out}.kernel", f"{out}.bias"],
                    [f"{out}.planes"],
                    strides=[stride, stride],
                    kernel_shape=[stride, stride],
                ),
                helper.make_node("Transpose", [f"{out}.planes"], [f"{out}.rows"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"{out}.rows", f"{out}.shape"], [out]),
            ]
    outputs = [
        helper.make_tensor_value_info(f"{name}_{stride}", TensorProto.FLOAT, [1, None, channels])
        for name, channels in _OUTPUTS.items()
        for stride in _STRIDES
    ]
    photo = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, "height", "width"])
    graph = helper.make_graph(nodes, "detector", [photo], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return str(path)


def photo_with(cells: list[tuple[int, int]], height: int, width: int) -> NDArray[np.uint8]:
    """Return grey noise with a red cell at each (row, column), multiples of 8."""
    grey = np.random.default_rng(0).integers(0, 256, (height, width, 1), np.uint8)
    photo = np.repeat(grey, 3, axis=2)
    for top, left in cells:
        photo[top : top + CELL_PX, left : left + CELL_PX] = (255, 0, 0)
    return photo


def check_grey_faces(result: NDArray[Any], photo: NDArray[np.uint8], cells: list[tuple[int, int]]) -> None:
    """Check that a result is the photo with every face grey, as much as the soft mask says, and outside the
    squares the photo itself. Landmarks of float32 move the mask by 1e-5 px, which may turn a half.
    """
    share = soft_mask()[:: 512 // SQUARE_PX, :: 512 // SQUARE_PX, None]
    padding = ((SQUARE_PX, SQUARE_PX), (SQUARE_PX, SQUARE_PX), (0, 0))
    expected, is_outside = np.pad(photo.astype(np.float32), padding), np.pad(photo == photo, padding)
    for top, left in cells:
        place = np.s_[top + SQUARE_PX // 2 :, left + SQUARE_PX // 2 :]
        part = expected[place][:SQUARE_PX, :SQUARE_PX]
        part[:] = share * GREY + (1 - share) * part
        is_outside[place][:SQUARE_PX, :SQUARE_PX] = False
    inner = np.s_[SQUARE_PX:-SQUARE_PX, SQUARE_PX:-SQUARE_PX]
    assert np.abs(result - expected[inner]).max() < 0.51
    np.testing.assert_array_equal(result[is_outside[inner]], photo[is_outside[inner]])


class _Grey(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, GREY / 127.5 - 1)


def grey_model() -> Upscaler:
    """Return a model of scale 1 that makes everything grey."""
    config = ForeignConfig(architecture="Grey", scale=1, supports_half=True, supports_bfloat16=True)
    return Upscaler(config, _Grey(), name="grey", identity="grey", device="cpu")
