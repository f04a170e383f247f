"""ICC profiles of RGB spaces that are given by numbers: primaries and a transfer curve (ICC.1:2022).

PNG (gAMA, cHRM, cICP), HEIF and AVIF (nclx) tell their colours in this way. A profile says the same to every
program and fits into every format, so such a picture is treated as one with a profile.

    linear = M_adapt [X_r Y_r Z_r; ...] rgb^gamma      relative to the white of the connection space, D50
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SRGB_CURVE = (
    2.4,
    1 / 1.055,
    0.055 / 1.055,
    1 / 12.92,
    0.04045,
)  # g, a, b, c, d of a parametric curve, type 3
_D65 = (0.3127, 0.329)
# ITU-T H.273, table 2: white, red, green, blue.
PRIMARIES: dict[int, tuple[tuple[float, float], ...]] = {
    1: (_D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    5: (_D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (_D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07)),
    9: (_D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: (_D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
}
# Table 3: gamma, or None for the curve of sRGB. That of BT.709 is for video; pictures that say so are shown
# with the curve of sRGB.
_GAMMAS: dict[int, float | None] = {1: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
_NAMES = {1: "BT.709", 5: "BT.601", 6: "BT.601", 9: "BT.2020", 12: "Display P3"}


def coded_profile(primaries: int, transfer: int) -> bytes | None:
    """Return the profile of code points of ITU-T H.273; None for sRGB, and for codes without an RGB space."""
    if primaries == 1 and _GAMMAS.get(transfer, 0) is None:
        return None
    if primaries not in PRIMARIES or (transfer not in _GAMMAS and transfer not in HDR_TRANSFERS):
        return None
    return matrix_profile(colorants(PRIMARIES[primaries]), _GAMMAS.get(transfer), _NAMES[primaries])


def colorants(primaries: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    """Return the XYZ of red, green and blue in its columns, (3, 3), adapted to D50.

    Args:
        primaries: (x, y) of white, red, green and blue.

    Raises:
        ValueError: The primaries span no colours.
    """
    if any(y <= 0 for _, y in primaries):
        raise ValueError(f"primaries must have y above 0, got {primaries}")
    white, red, green, blue = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in primaries)
    columns = np.stack([red, green, blue], axis=1)
    if abs(np.linalg.det(columns)) < 1e-6:
        raise ValueError(f"primaries must span a triangle, got {primaries}")
    cone = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(cone) @ _BRADFORD
    return adapt @ (columns * np.linalg.solve(columns, white))


def matrix_profile(columns: NDArray[np.float64], gamma: float | None, name: str) -> bytes:
    """Return a version 4 display profile.

    Args:
        columns: XYZ of red, green and blue in its columns, (3, 3), adapted to D50.
        gamma: Exponent of the curve; None is the curve of sRGB.
        name: Description, ASCII.
    """
    curve = _curve(gamma)
    return _profile(
        b"RGB ",
        name,
        {b"rXYZ": _xyz(columns[:, 0]), b"gXYZ": _xyz(columns[:, 1]), b"bXYZ": _xyz(columns[:, 2])}
        | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    )


def grey_profile(gamma: float | None, name: str) -> bytes:
    """Return a version 4 profile of grey; see `matrix_profile`."""
    return _profile(b"GRAY", name, {b"kTRC": _curve(gamma)})


def _curve(gamma: float | None) -> bytes:
    values = (gamma,) if gamma is not None else _SRGB_CURVE
    return b"para" + struct.pack(">IHH", 0, 3 if gamma is None else 0, 0) + b"".join(map(_fixed, values))


def _profile(space: bytes, name: str, colours: dict[bytes, bytes]) -> bytes:
    text = name.encode("utf-16-be")
    localised = b"mluc" + struct.pack(">IIIIII", 0, 1, 12, 0x656E5553, len(text), 28) + text
    tags = {
        b"desc": localised,
        b"cprt": localised,
        b"wtpt": _xyz(_D50),
        **colours,
    }
    table, body, places = b"", b"", dict[bytes, int]()
    start = 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        if data not in places:
            places[data] = start + len(body)
            body += data + bytes(-len(data) % 4)
        table += tag + struct.pack(">II", places[data], len(data))
    size = start + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s", size, 0x04300000, b"mntr", space, b"XYZ ", b"acsp").ljust(
        68, b"\0"
    )
    header += b"".join(map(_fixed, _D50))
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))
