"""Published weights that can be had by name. This package contains none of them.

ResShift and SinSR publish weights for research only, so their licence must be accepted first; the others are
under permissive licences. sha256 sums are those that distributions and other projects record for the same
addresses, where several agree; a file without one is checked against its first download.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from resshift.models.cache import Cache, Origin, cache_directory, digest_of
from resshift.models.files import WeightsError

_S_LAB = "S-Lab License 1.0 (non-commercial)"
_BSD_3 = "BSD-3-Clause"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A published weight file.

    Fields:
        name: Name of the file.
        url: Address.
        licence: Name of its licence.
        sha256: Digest; None if its publisher gives none and no record of it is known.
        is_permissive: Whether the licence allows any use, so that nobody has to accept it first.
    """

    name: str
    url: str
    licence: str
    sha256: str | None = None
    is_permissive: bool = False

    @property
    def repository(self) -> str:
        """Address of the project, where its licence is."""
        return self.url.partition("/releases/")[0]


def _resshift(name: str) -> RemoteFile:
    return RemoteFile(name, f"https://github.com/zsyOAOA/ResShift/releases/download/v2.0/{name}", _S_LAB)


def _real_esrgan(release: str, name: str, sha256: str | None = None) -> RemoteFile:
    url = f"https://github.com/xinntao/Real-ESRGAN/releases/download/{release}/{name}"
    return RemoteFile(name, url, _BSD_3, sha256, is_permissive=True)


VQ_F4 = _resshift("autoencoder_vq_f4.pth")
VQ_F4_FACE = _resshift("celeba256_vq_f4_dim3_face.pth")
VQ_F8_FACE = _resshift("ffhq512_vq_f8_dim8_face.pth")
FIRST_STAGES = {"vq-f4": VQ_F4, "vq-f4-face": VQ_F4_FACE, "vq-f8-face": VQ_F8_FACE}


@dataclass(frozen=True, slots=True)
class Released:
    """Released weights of a preset: the U-Net and its first stage."""

    preset: str
    unet: RemoteFile
    first_stage: RemoteFile = VQ_F4


# Names of models -> their weights. Where two belong to one preset, the newer one has the name of the preset.
RELEASED = {
    "realsr-x4-s15": Released("realsr-x4-s15", _resshift("resshift_realsrx4_s15_v2.pth")),
    "realsr-x4-s15-v1": Released("realsr-x4-s15", _resshift("resshift_realsrx4_s15_v1.pth")),
    "realsr-x4-s4": Released("realsr-x4-s4", _resshift("resshift_realsrx4_s4_v3.pth")),
    "bicubic-x4-s4": Released("bicubic-x4-s4", _resshift("resshift_bicsrx4_s4.pth")),
    "inpaint-imagenet-s4": Released("inpaint-imagenet-s4", _resshift("resshift_inpainting_imagenet_s4.pth")),
    "inpaint-face-s4": Released("inpaint-face-s4", _resshift("resshift_inpainting_face_s4.pth"), VQ_F4_FACE),
    "face-s4": Released("face-s4", _resshift("resshift_faceir_s4.pth"), VQ_F8_FACE),
    "sinsr-x4-s1": Released(
        "sinsr-x4-s1",
        RemoteFile(
            "SinSR_v1.pth",
            "https://github.com/wyf0912/SinSR/releases/download/v1.0/SinSR_v1.pth",
            _S_LAB,
        ),
    ),
}

# Names of models that are one file, which the package spandrel reads.
FOREIGN = {
    "realesrgan-x4plus": _real_esrgan(
        "v0.1.0", "RealESRGAN_x4plus.pth", "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1"
    ),
    "realesrgan-x4plus-anime": _real_esrgan(
        "v0.2.2.4",
        "RealESRGAN_x4plus_anime_6B.pth",
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
    ),
    "realesrgan-x2plus": _real_esrgan(
        "v0.2.1", "RealESRGAN_x2plus.pth", "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb"
    ),
    "realesrnet-x4plus": _real_esrgan("v0.1.1", "RealESRNet_x4plus.pth"),
    "realesr-general-x4v3": _real_esrgan(
        "v0.2.5.0",
        "realesr-general-x4v3.pth",
        "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
    ),
    "realesr-general-wdn-x4v3": _real_esrgan(
        "v0.2.5.0",
        "realesr-general-wdn-x4v3.pth",
        "1641f8c4464b9f097c9fdda5589273713f67cf59f3d909e0bd688f0cee269dca",
    ),
    "realesr-animevideov3": _real_esrgan(
        "v0.2.5.0",
        "realesr-animevideov3.pth",
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
    ),
}


def fetch(
    file: RemoteFile, *, accept_licence: bool, directory: Path | None = None, timeout_s: float = 60.0
) -> Path:
    """Return the local copy of a published file: one that somebody put into the directory of the cache under
    its name, or one that is downloaded once.

    Args:
        file: Weight file.
        accept_licence: Whether the user has accepted `file.licence`; not asked of permissive ones.
        directory: Directory of the cache; None is `cache_directory()`.
        timeout_s: Timeout of the connection and of each read.

    Raises:
        WeightsError: The licence was not accepted, the download failed, or the sha256 is not as expected.
    """
    directory = directory or cache_directory()
    by_hand = directory / file.name
    if by_hand.is_file():
        if file.sha256 is not None and (digest := digest_of(by_hand)) != file.sha256:
            raise WeightsError(
                f"{by_hand} has sha256 {digest}, expected {file.sha256}: delete it and try again"
            )
        return by_hand

    def chunks() -> Iterator[bytes]:
        if not (accept_licence or file.is_permissive):
            raise WeightsError(
                f"{file.name} is published under {file.licence}. Read it at {file.repository}, and if you "
                "agree set RESSHIFT_ACCEPT_LICENCE=1 or pass accept_licence=True"
            )
        with urllib.request.urlopen(file.url, timeout=timeout_s) as response:
            promised, size = response.headers.get("Content-Length"), 0
            while chunk := response.read(1 << 20):
                size += len(chunk)
                yield chunk
        if promised is not None and size != int(promised):
            raise WeightsError(f"{file.url} ended after {size} of {promised} bytes; try again")

    origin = Origin(
        address=file.url, version="", suffix=Path(file.name).suffix, chunks=chunks, sha256=file.sha256
    )
    try:
        return Cache(directory).get(origin)
    except (OSError, HTTPException) as error:  # URLError is an OSError; a broken chunk is an HTTPException
        raise WeightsError(
            f"{file.url} could not be downloaded: {error}. Without a network here, fetch it elsewhere and "
            f"put it at {by_hand}"
        ) from error
