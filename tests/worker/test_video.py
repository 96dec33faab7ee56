"""Frames to MP4: what players need of the file, read back with the ffmpeg that wrote it."""

import io
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from tests.clips import decode
from worker.video import EncodingError, encode_mp4, encode_thumbnail


@pytest.fixture
def frames():
    """A bright square that moves over a gradient, 17 frames."""
    made = np.zeros((17, 64, 64, 3), np.uint8)
    made[..., 0] = np.linspace(40, 160, 64, dtype=np.uint8)
    for t in range(17):
        made[t, 20:40, 2 * t : 2 * t + 20] = (230, 40, 40)
    return made


def test_the_file_is_h264_yuv420p_with_its_index_first(frames, tmp_path):
    mp4 = encode_mp4(frames, fps=8)
    (tmp_path / "v.mp4").write_bytes(mp4)
    said = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(tmp_path / "v.mp4")], capture_output=True, text=True
    ).stderr
    assert re.search(r"Video: h264 .*yuv420p.* 64x64.* 8 fps", said), said
    assert mp4.index(b"moov") < mp4.index(b"mdat")


def test_the_frames_survive(frames, tmp_path):
    back = decode(encode_mp4(frames, fps=8), tmp_path)
    assert back.shape == frames.shape
    # Chroma is halved, so colour edges move; the picture as a whole must not.
    assert np.abs(back.astype(int) - frames.astype(int)).mean() < 4


def test_the_same_frames_give_the_same_bytes(frames):
    assert encode_mp4(frames, fps=8) == encode_mp4(frames.copy(), fps=8)


def test_odd_sides_are_refused(frames):
    with pytest.raises(ValueError, match=r"63 x 64; H\.264 in yuv420p needs even sides"):
        encode_mp4(frames[:, :, :63], fps=8)


@pytest.mark.parametrize("script", ["echo half > ${!#}; echo no space left >&2; exit 1", "exit 0"])
def test_what_ffmpeg_did_not_finish_is_an_error(frames, tmp_path, monkeypatch, script):
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/bash\ncat >/dev/null\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setattr("worker.video.imageio_ffmpeg.get_ffmpeg_exe", lambda: str(fake))
    with pytest.raises(EncodingError, match=r"ffmpeg ended with [01]: "):
        encode_mp4(frames, fps=8)


def test_the_thumbnail_is_the_middle_frame(frames):
    with Image.open(io.BytesIO(encode_thumbnail(frames))) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - frames[8].astype(int)).mean() < 6
