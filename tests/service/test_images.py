"""The input firewall: what comes through is clean, what does not says why."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from service.errors import ApiError
from service.images import clean, from_data_url

MAX_PIXELS = 4_000_000


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture
def halves():
    """128 x 64: left half red, right half blue."""
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (64, 0, 128, 64))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_each_format_becomes_a_png_of_the_models_size(halves, kind):
    result = opened(clean(encoded(halves, kind), 64, 64, MAX_PIXELS))
    assert (result.format, result.mode, result.size) == ("PNG", "RGB", (64, 64))
    pixels = np.asarray(result).astype(int)
    # Cropped around the centre: the border between the halves is in the middle.
    assert pixels[32, 8, 0] > 200
    assert pixels[32, 8, 2] < 60
    assert pixels[32, 56, 2] > 200


def test_a_picture_of_the_right_size_keeps_its_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    result = clean(encoded(Image.fromarray(noise)), 64, 64, MAX_PIXELS)
    assert np.array_equal(np.asarray(opened(result)), noise)


def test_exif_orientation_is_applied(halves):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it: the left half is then above
    pixels = np.asarray(opened(clean(encoded(halves, "JPEG", exif=exif), 64, 64, MAX_PIXELS))).astype(int)
    assert pixels[8, 32, 0] > 200
    assert pixels[56, 32, 2] > 200


def test_metadata_and_what_follows_the_picture_are_dropped(halves):
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "my secret")
    data = encoded(halves, pnginfo=info) + b"<script>hidden</script>"
    result = clean(data, 64, 64, MAX_PIXELS)
    assert b"secret" not in result
    assert b"hidden" not in result
    assert opened(result).info == {}


def test_transparency_is_laid_on_white():
    result = opened(clean(encoded(Image.new("RGBA", (64, 64), (255, 0, 0, 0))), 64, 64, MAX_PIXELS))
    assert result.getpixel((5, 5)) == (255, 255, 255)


def test_sixteen_bit_pictures_keep_their_greys():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey = np.asarray(opened(clean(encoded(Image.fromarray(ramp)), 64, 64, MAX_PIXELS)).convert("L")).astype(int)
    assert np.abs(grey - ramp // 256).max() <= 1


def test_a_phones_jpeg_with_a_second_picture_is_its_first():
    first, second = Image.new("RGB", (96, 96), "red"), Image.new("RGB", (96, 96), "blue")
    data = encoded(first, "MPO", save_all=True, append_images=[second])
    assert opened(clean(data, 64, 64, MAX_PIXELS)).getpixel((30, 30))[0] > 240


def test_a_large_transparent_picture_gives_the_right_colours():
    """It is reduced before its transparency is laid on white."""
    data = encoded(Image.new("RGBA", (2000, 2000), (200, 10, 10, 128)))
    assert opened(clean(data, 64, 64, MAX_PIXELS)).getpixel((5, 5)) == pytest.approx((227, 132, 132), abs=2)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA"])
def test_other_colour_modes_are_converted(mode):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert opened(clean(encoded(Image.new(mode, (80, 90)), kind), 64, 64, MAX_PIXELS)).mode == "RGB"


def bomb_header(width: int, height: int) -> bytes:
    """A PNG that claims to be huge and holds nothing."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + ihdr + struct.pack(">I", zlib.crc32(ihdr))
    return b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IEND\xaeB`\x82"


def animated() -> bytes:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "status", "code", "says"),
    [
        pytest.param(b"", 422, "image_empty", "empty", id="empty"),
        pytest.param(b"GIF89a" + b"\0" * 40, 415, "image_format", "begins with 47 49 46", id="gif"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "image_format", "not a PNG", id="svg"),
        pytest.param(b"MZ" + b"\0" * 200, 415, "image_format", "not a PNG", id="program"),
        pytest.param(bomb_header(3000, 3000), 422, "image_too_large", "3000 x 3000 pixels", id="too-large"),
        pytest.param(bomb_header(60000, 60000), 422, "image_too_large", "at most 4000000 pixels", id="bomb"),
        pytest.param(bomb_header(17000, 20), 422, "image_too_large", "16384 a side", id="too-wide"),
        pytest.param(encoded(Image.new("RGB", (8, 64))), 422, "image_too_small", "8 x 64", id="too-small"),
        pytest.param(animated(), 422, "image_animated", "2 frames", id="animated"),
        pytest.param(encoded(Image.new("RGB", (64, 64)))[:60], 422, "image_damaged", "cut short", id="cut-short"),
        pytest.param(bomb_header(64, 64), 422, "image_damaged", "damaged", id="no-pixels"),
    ],
)
def test_what_is_refused_says_why(data, status, code, says):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ApiError) as caught:
            clean(data, 64, 64, MAX_PIXELS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "image")
    assert says in caught.value.message


def test_data_urls():
    assert from_data_url("data:image/png;base64,aGVsbG8=") == b"hello"
    for text in ("hello", "data:image/png,hello", "https://example.com/a.png"):
        with pytest.raises(ApiError, match="wanted a data URL"):
            from_data_url(text)
    with pytest.raises(ApiError, match="not base64"):
        from_data_url("data:image/png;base64,a$b")
    with pytest.raises(ApiError, match="not base64"):
        from_data_url("data:image/png;base64,é")
