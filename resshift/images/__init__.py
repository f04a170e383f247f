"""Pictures: encoded bytes <-> arrays <-> tensors; `from resshift import images`.

`probe` reads a header, `decode` returns a `Picture` (upright, sRGB, RGB or grey, alpha apart), and `encode`
writes one; `to_tensor` and `from_tensor` convert pixels to tensors and back. Animations are in
`resshift.images.animation`, and decoding in a separate process is in `resshift.images.sandbox`.
"""

from resshift.images.decoding import decode, from_pil
from resshift.images.encoding import check_sizes, encode, fit_format, in_own_profile, is_srgb, to_pil
from resshift.images.header import probe
from resshift.images.samples import from_array, from_tensor, rgb_u8, swap_red_blue, to_array, to_tensor
from resshift.images.types import (
    Array,
    Format,
    ImageError,
    ImageHeader,
    ImageLimits,
    ImageReason,
    Picture,
    scaled,
)

__all__ = [
    "Array",
    "Format",
    "ImageError",
    "ImageHeader",
    "ImageLimits",
    "ImageReason",
    "Picture",
    "check_sizes",
    "decode",
    "encode",
    "fit_format",
    "from_array",
    "from_pil",
    "from_tensor",
    "in_own_profile",
    "is_srgb",
    "probe",
    "rgb_u8",
    "scaled",
    "swap_red_blue",
    "to_array",
    "to_pil",
    "to_tensor",
]
