"""Faces in whole photos: found, restored by a model of aligned faces, and put back."""

from resshift.faces.detect import FaceDetector, Landmarks, YuNet
from resshift.faces.restore import Restored, restore_faces

__all__ = ["FaceDetector", "Landmarks", "Restored", "YuNet", "restore_faces"]
