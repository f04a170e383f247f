"""Samples: tensors and depths by known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resshift.images import Picture, from_tensor, rgb_u8, to_tensor

CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]], [[0, 0, 0], [250, 250, 250]]], dtype=np.uint8
)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tensor_round_trip_is_exact_for_every_value(dtype: type[np.uint8] | type[np.uint16]) -> None:
    highest = np.iinfo(dtype).max
    every = np.arange(highest + 1, dtype=dtype).reshape(-1, 256, 1)
    x = to_tensor(every)
    assert x.shape == (1, 3, every.shape[0], 256)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    np.testing.assert_array_equal(from_tensor(x, dtype), every.repeat(3, axis=2))
    torch.testing.assert_close(
        x[0, 0].double(),
        torch.as_tensor(every[..., 0].astype(np.float64)) / highest * 2 - 1,
        rtol=0,
        atol=2e-7,
    )


def test_tensor_layout_is_rgb() -> None:
    x = to_tensor(CORNERS)
    assert (x[0, :, 0, 0] > 0).tolist() == [True, False, False]
    np.testing.assert_array_equal(from_tensor(x), CORNERS)
    np.testing.assert_array_equal(from_tensor(x[0].bfloat16().float()).shape, CORNERS.shape)


def test_from_tensor_rounds_halves_up_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 7.0], dtype=torch.float64).reshape(1, 1, 1, -1)
    assert from_tensor(values).ravel().tolist() == [0, 0, 128, 255, 255]  # 0.0 is 127.5 exactly


def test_from_tensor_refuses_what_would_fail_silently() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="NaN or infinity"):
            from_tensor(torch.full((1, 3, 2, 2), bad))
    with pytest.raises(ValueError, match="x must be"):
        from_tensor(torch.zeros(2, 3, 4, 4))


def test_every_sixteen_bit_value_is_rounded_to_the_nearest_level() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256, 1)
    expected = np.round(every / 257).astype(np.uint8)  # 65535 / 255 = 257 is odd: there are no ties
    np.testing.assert_array_equal(rgb_u8(Picture(pixels=every)), expected.repeat(3, axis=2))
    np.testing.assert_array_equal(rgb_u8(Picture(pixels=CORNERS)), CORNERS)
