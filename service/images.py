"""The input firewall: any bytes in, a clean picture of the model's size out, or a 4xx that says what was wrong.

The rule: PNG, JPEG or WEBP, judged by content; one frame; at most ``max_pixels``, asked of the header before anything
is decoded. EXIF orientation is applied, transparency is laid on white, the picture is cropped around its centre to the
model's aspect ratio and resized (Lanczos), and written anew as PNG, so no metadata and nothing hidden in the file
survives.
"""

from __future__ import annotations

import base64
import ctypes
import io
import threading
import warnings
from contextlib import suppress

from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import ApiError

FORMATS = ("PNG", "JPEG", "WEBP")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
MIN_SIDE = 16
MAX_SIDE = 16_384

_MAX_PARTS = 20_000
"""Chunks of a PNG, segments of a JPEG: Pillow takes microseconds and bytes for each, and a few MB can be millions."""
_MAX_SCANS = 500
"""Of a JPEG, each a pass over all its pixels; cameras and tools make about ten."""

_DECODING = threading.Semaphore(2)
"""A small file can hold a large picture: not every request thread may decode one at once."""


def _keep_no_memory() -> None:
    """Have the C library (glibc) give every MiB and more back to the system once it is freed.

    Otherwise it learns from the first large picture to keep such memory, for each thread its own: over a gigabyte.
    """
    with suppress(AttributeError, OSError):  # another library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


_M_MMAP_THRESHOLD = -3
_keep_no_memory()


def clean(data: bytes, width: int, height: int, max_pixels: int) -> bytes:
    """``data`` as a PNG of ``width`` x ``height``.

    Raises:
        ApiError: 415 not one of the formats; 422 damaged, animated, too large or too small.
    """
    if not data:
        raise ApiError(422, "image_empty", "the image is empty; send a PNG, JPEG or WEBP file", param="image")
    _check_parts(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about sizes that are judged below, and about odd metadata
            with _DECODING, Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_header(image, max_pixels)
                image.draft("RGB", (4 * width, 4 * height))  # a JPEG is decoded small at once; others ignore it
                image.load()
                return _fit(image, width, height)
    except ApiError:
        raise
    except UnidentifiedImageError as error:
        if _is_one_of_ours(data):
            raise _damaged(error) from None
        begins = data[:8].hex(" ")
        message = f"the image is not a PNG, JPEG or WEBP file (it begins with {begins}); convert it and send it again"
        raise ApiError(415, "image_format", message, param="image") from None
    except Image.DecompressionBombError:
        raise _too_many_pixels("hundreds of millions of pixels", max_pixels) from None
    except Exception as error:  # Pillow raises many kinds for files that are cut short or forged
        raise _damaged(error) from None


def from_data_url(text: str) -> bytes:
    """The bytes of ``data:image/...;base64,...``. Raises ``ApiError`` 422."""
    head, comma, payload = text.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64") and comma):
        message = f"image: got text that begins {text[:24]!r}; wanted a data URL, data:image/png;base64,..."
        raise ApiError(422, "image_not_data_url", message, param="image")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error, or letters that are not ASCII
        raise ApiError(422, "image_not_base64", f"image: the data URL is not base64 ({error})", param="image") from None


def _is_one_of_ours(data: bytes) -> bool:
    return data.startswith((_PNG, _JPEG)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _damaged(error: Exception) -> ApiError:
    message = (
        f"the image cannot be decoded ({type(error).__name__}): the file is damaged or cut short, or holds too much "
        "beside the picture; save it anew, without metadata"
    )
    return ApiError(422, "image_damaged", message, param="image")


def _check_parts(data: bytes) -> None:
    """Whether a file is of so few parts that it can be read at a bearable cost. Raises ``ApiError`` 422."""
    parts = scans = 0
    if data.startswith(_PNG):
        place = len(_PNG)
        while place < len(data) and data[place + 4 : place + 8] != b"IEND" and parts <= _MAX_PARTS:
            parts += 1
            place += 12 + int.from_bytes(data[place : place + 4], "big")
    elif data.startswith(_JPEG):
        place = 2
        while place < len(data) and parts <= _MAX_PARTS:
            parts += 1
            marker = data[place + 1 : place + 2]
            if data[place] != 0xFF or marker == b"\xff":
                place += 1  # padding, of which each byte costs as much
            elif marker == b"\xda":
                scans = data.count(b"\xff\xda", place)
                break
            else:
                place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if parts > _MAX_PARTS or scans > _MAX_SCANS:
        message = (
            f"the image file is of more than {_MAX_PARTS} pieces or {_MAX_SCANS} scans; save it anew, without metadata"
        )
        raise ApiError(422, "image_too_complex", message, param="image")


def _check_header(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise _too_many_pixels(f"{width} x {height} pixels", max_pixels)
    if min(width, height) < MIN_SIDE:
        message = f"the image is {width} x {height} pixels; each side must be at least {MIN_SIDE}"
        raise ApiError(422, "image_too_small", message, param="image")
    # A phone's JPEG may carry a second picture (MPO: depth, gain map); the first is the photograph.
    if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:
        message = f"the image has {getattr(image, 'n_frames', 1)} frames; send a still picture"
        raise ApiError(422, "image_animated", message, param="image")


def _too_many_pixels(got: str, max_pixels: int) -> ApiError:
    message = f"the image has {got}; at most {max_pixels} pixels and {MAX_SIDE} a side are taken. Scale it down"
    return ApiError(422, "image_too_large", message, param="image")


def _fit(image: Image.Image, width: int, height: int) -> bytes:
    image = _reduced(image, 2 * width, 2 * height)
    if image.mode == "I":  # 16 bits a pixel, which Pillow would cut off at 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    upright = _upright(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layered = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered)
    picture = ImageOps.fit(upright.convert("RGB"), (width, height), Image.Resampling.LANCZOS, centering=(0.5, 0.5))
    buffer = io.BytesIO()
    # A new picture from the pixels alone: `info` (EXIF, text, profiles) stays behind.
    Image.frombytes("RGB", picture.size, picture.tobytes()).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _reduced(image: Image.Image, width: int, height: int) -> Image.Image:
    """Down to no less than this size by whole factors, before anything copies it at its own."""
    if image.mode.startswith("I;"):
        image = image.convert("I")
    elif image.mode in ("1", "P", "PA"):  # whose pixels cannot be averaged
        image = image.convert("RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB")
    factor = min(image.width // width, image.height // height)
    return image.reduce(factor) if factor > 1 else image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read: nobody knows which way is up, and the picture itself is sound
        return image
