"""Where faces are: an interface, and YuNet in OpenCV with a file of the user.

No package that this project installs ships the weights of a detector; YuNet's are MIT, a small file in
OpenCV's model zoo (face_detection_yunet_2026may.onnx, or 2023mar with OpenCV 4).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.config import OptionError
from resshift.images import swap_red_blue
from resshift.models.locations import local_file

Landmarks = NDArray[np.float64]
# YuNet was trained on faces of 10 to 300 px: in a larger photo it takes details for faces and misses large
# ones.
_LONGEST_PX = 1024
_ERROR = 2  # level of OpenCV's log


class FaceDetector(Protocol):
    """Anything that finds faces."""

    def __call__(self, photo_u8: NDArray[np.uint8]) -> Sequence[Landmarks]:
        """Return the landmarks of every face of an RGB photo, (5, 2) each, in pixels (x, y): the eyes from
        left to right in the picture, the nose, the corners of the mouth from left to right.
        """
        ...


class YuNet:
    """YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023). It looks at a photo of at
    most 1024 px; larger ones are shrunk for it. May be called from any thread.

    Args:
        weights: ONNX file: a path, file://, s3:// or hf://OWNER/NAME/FILE.
        least_score: Score from which on a face counts, in [0, 1].

    Raises:
        ValueError: The file is not there, or OpenCV cannot read it.
    """

    def __init__(self, weights: str | Path, least_score: float = 0.7) -> None:
        path = local_file(weights)
        if not path.is_file():
            raise ValueError(f"the weights of YuNet must be an ONNX file, got {weights}, which is not there")
        log: Any = cv2.utils.logging
        level = log.getLogLevel()
        log.setLogLevel(_ERROR)  # OpenCV 5 warns of a target that nobody asked for
        try:
            self._net: Any = cv2.FaceDetectorYN.create(str(path), "", (320, 320), least_score)
        except cv2.error as error:
            raise ValueError(
                f"the weights of YuNet must be an ONNX file, got {weights}: {' '.join(str(error).split())}"
            ) from error
        finally:
            log.setLogLevel(level)
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self._turn = threading.Lock()

    def __call__(self, photo_u8: NDArray[np.uint8]) -> Sequence[Landmarks]:
        """Return the landmarks of every face, the largest score first."""
        height, width = photo_u8.shape[:2]
        shrink = min(1.0, _LONGEST_PX / max(height, width))
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        if shrink < 1:
            photo_u8 = np.asarray(cv2.resize(photo_u8, size, interpolation=cv2.INTER_AREA), np.uint8)
        with self._turn:
            self._net.setInputSize(size)
            _, rows = self._net.detect(swap_red_blue(photo_u8))
        # A row: x, y, width, height, the five points (eyes and mouth from left to right in the picture, which
        # YuNet names by the side of the person), score.
        found = np.empty((0, 15)) if rows is None else np.asarray(rows, np.float64)
        points = found[np.argsort(-found[:, 14], kind="stable"), 4:14].reshape(-1, 5, 2)
        return list((points + 0.5) * (width / size[0], height / size[1]) - 0.5)


@lru_cache(maxsize=4)
def yunet(weights: str) -> YuNet:
    """Return the detector that `Sampling.faces` names; a process loads it once.

    Raises:
        OptionError: It cannot be loaded.
    """
    try:
        return YuNet(weights)
    except ValueError as error:
        raise OptionError("faces", f"must be the file of a face detector: {error}") from None
