"""Frames to MP4: what players need of the file, read back with the ffmpeg that wrote it."""

import io
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from worker.video import encode_mp4, encode_thumbnail


@pytest.fixture
def frames():
    """A bright square that moves over a gradient, 17 frames."""
    made = np.zeros((17, 64, 64, 3), np.uint8)
    made[..., 0] = np.linspace(40, 160, 64, dtype=np.uint8)
    for t in range(17):
        made[t, 20:40, 2 * t : 2 * t + 20] = (230, 40, 40)
    return made


def decode(mp4: bytes, path) -> np.ndarray:
    path.write_bytes(mp4)
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_the_file_is_h264_yuv420p_with_its_index_first(frames, tmp_path):
    mp4 = encode_mp4(frames, fps=8)
    (tmp_path / "v.mp4").write_bytes(mp4)
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(tmp_path / "v.mp4")], capture_output=True, text=True
    ).stderr
    assert re.search(r"Video: h264 .*yuv420p.* 64x64.* 8 fps", said), said
    assert mp4.index(b"moov") < mp4.index(b"mdat")


def test_the_frames_survive(frames, tmp_path):
    back = decode(encode_mp4(frames, fps=8), tmp_path / "v.mp4")
    assert back.shape == frames.shape
    # Chroma is halved, so colour edges move; the picture as a whole must not.
    assert np.abs(back.astype(int) - frames.astype(int)).mean() < 4


def test_the_same_frames_give_the_same_bytes(frames):
    assert encode_mp4(frames, fps=8) == encode_mp4(frames.copy(), fps=8)


def test_odd_sides_are_refused(frames):
    with pytest.raises(ValueError, match=r"63 x 64; H\.264 in yuv420p needs even sides"):
        encode_mp4(frames[:, :, :63], fps=8)


def test_the_thumbnail_is_the_middle_frame(frames):
    with Image.open(io.BytesIO(encode_thumbnail(frames))) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - frames[8].astype(int)).mean() < 6
