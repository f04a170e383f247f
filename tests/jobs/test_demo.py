"""What the demo shows: bundled photos, damaged always alike."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.testset import RECIPES
from resshift.models import locate_model
from tests.scripts import load_script

demo: Any = load_script("jobs/demo.py")


def test_every_photo_has_a_damage_that_is_named_and_a_model_that_ships() -> None:
    for damage, model in demo.PHOTOS.values():
        assert damage in RECIPES
        assert demo.DAMAGES[damage]
        assert locate_model(model).config.scale == demo.SCALE


@pytest.mark.slow
def test_damage_is_a_quarter_of_the_size_and_always_the_same() -> None:
    found: set[str] = set()
    for name, (damage, _) in demo.PHOTOS.items():
        photo = demo.original(name)
        worse = demo.damaged(photo, name)
        assert max(photo.shape) <= demo.LONGEST_PX
        assert worse.shape == (photo.shape[0] // 4, photo.shape[1] // 4, 3)
        assert np.array_equal(worse, demo.damaged(photo.copy(), name))
        found.add(hashlib.sha256(worse.tobytes()).hexdigest())
        if damage == "realesrgan-x4":  # more than shrinking
            shrunk = photo.reshape(worse.shape[0], 4, worse.shape[1], 4, 3).mean((1, 3))
            assert np.abs(shrunk - worse).mean() > 3
    assert len(found) == len(demo.PHOTOS)
