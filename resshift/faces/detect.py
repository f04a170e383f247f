"""Where faces are: an interface, and YuNet in OpenCV with a file of the user.

No package that this project installs ships the weights of a detector; YuNet's are MIT, a small file in
OpenCV's model zoo (face_detection_yunet_2023mar.onnx).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.images import swap_red_blue

Landmarks = NDArray[np.float64]


class FaceDetector(Protocol):
    """Anything that finds faces."""

    def __call__(self, photo_u8: NDArray[np.uint8]) -> Sequence[Landmarks]:
        """Return the landmarks of every face of an RGB photo, (5, 2) each, in pixels (x, y): the eyes from
        left to right in the picture, the nose, the corners of the mouth from left to right.
        """
        ...


class YuNet:
    """YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023).

    Args:
        weights: ONNX file.
        least_score: Score from which on a face counts, in [0, 1].

    Raises:
        ValueError: The file is not there, or OpenCV cannot read it.
    """

    def __init__(self, weights: str | Path, least_score: float = 0.7) -> None:
        if not Path(weights).is_file():
            raise ValueError(f"the weights of YuNet must be an ONNX file, got {weights}, which is not there")
        try:
            self._net: Any = cv2.FaceDetectorYN.create(str(weights), "", (320, 320), least_score)
        except cv2.error as error:
            raise ValueError(f"the weights of YuNet must be an ONNX file, got {weights}: {error}") from error

    def __call__(self, photo_u8: NDArray[np.uint8]) -> Sequence[Landmarks]:
        """Return the landmarks of every face, the largest score first."""
        self._net.setInputSize((photo_u8.shape[1], photo_u8.shape[0]))
        _, rows = self._net.detect(swap_red_blue(photo_u8))
        # A row: x, y, width, height, the five points (eyes and mouth from left to right in the picture, which
        # YuNet names by the side of the person), score.
        found = np.empty((0, 15)) if rows is None else np.asarray(rows, np.float64)
        return [row[4:14].reshape(5, 2) for row in found[np.argsort(-found[:, 14], kind="stable")]]
