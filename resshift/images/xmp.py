"""XMP: the packet in which editors store rights, captions, ratings and settings (ISO 16684-1). It is carried
to an upscaled picture.

It is copied byte for byte, except for what would be wrong for the new file: the orientation, which is applied
to the pixels, the sizes in pixels, thumbnails, and the reference to a second part of the packet in a JPEG
("extended XMP", which is not read). Only packets of up to 1 MB in UTF-8, which all writers of pictures use,
are accepted. Separate IPTC blocks are not carried; editors repeat their content in XMP.
"""

from __future__ import annotations

import re

from PIL import Image

_MAX_BYTES = 1 << 20
_THUMBNAILS = re.compile(rb"<(xmp|xap):Thumbnails\b.*?</\1:Thumbnails>", re.DOTALL)
# Parts of the file behind the photo, which are not in the new one: gain maps and the videos of motion photos.
_FOLLOWING = re.compile(rb"<(Container:Directory|GContainer:Directory)\b.*?</\1\s*>", re.DOTALL)
_OF_FOLLOWING = rb"(?:hdrgm:\w+|G?Camera:(?:MotionPhoto|MicroVideo)\w*)"
_WIDTHS, _HEIGHTS = (
    (b"tiff:ImageWidth", b"exif:PixelXDimension"),
    (b"tiff:ImageLength", b"exif:PixelYDimension"),
)


def descriptive_xmp(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the packet of a loaded picture, with orientation 1 and without thumbnails, and notes; None if
    there is no packet.
    """
    packet = image.info.get("xmp")
    if not packet:
        return None, ()
    if isinstance(packet, str):
        packet = packet.encode()
    problem = _problem(packet)
    if problem:
        return None, (f"XMP dropped, {problem}",)
    packet = _THUMBNAILS.sub(b"", packet.rstrip(b"\0"))
    packet = _FOLLOWING.sub(b"", packet)
    packet = _without(packet, rb"(?:xmpNote:HasExtendedXMP|" + _OF_FOLLOWING + b")")
    return _with_value(packet, b"tiff:Orientation", 1), ()


def resize_xmp(packet: bytes, width: int, height: int) -> bytes:
    """Return the packet with its sizes set to those of the picture that it is written into."""
    for names, value in ((_WIDTHS, width), (_HEIGHTS, height)):
        for name in names:
            packet = _with_value(packet, name, value)
    return packet


def _problem(packet: object) -> str:
    if not isinstance(packet, bytes):
        return "it is damaged"
    if len(packet) > _MAX_BYTES:
        return f"it is {len(packet)} bytes long, {_MAX_BYTES} are carried"
    try:
        packet.decode()
    except UnicodeDecodeError:
        return "it is not UTF-8"
    return "" if b"<rdf:RDF" in packet and b"<!" not in packet else "it is not an XMP packet"


def _with_value(packet: bytes, name: bytes, value: int) -> bytes:
    """Set a simple property wherever the packet has it, whether as an attribute or as an element."""
    number = b"%d" % value
    packet = re.sub(rb"(\b" + name + rb"\s*=\s*)(\"[^\"<]*\"|'[^'<]*')", rb'\g<1>"' + number + b'"', packet)
    return re.sub(
        rb"(<" + name + rb"\s*>)[^<]*(</" + name + rb"\s*>)", rb"\g<1>" + number + rb"\g<2>", packet
    )


def _without(packet: bytes, names: bytes) -> bytes:
    """Remove simple properties, whose names are given as a pattern."""
    packet = re.sub(rb"\s\b" + names + rb"\s*=\s*(\"[^\"<]*\"|'[^'<]*')", b"", packet)
    return re.sub(rb"<(" + names + rb")\s*>[^<]*</\1\s*>", b"", packet)
