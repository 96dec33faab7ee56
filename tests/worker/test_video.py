"""Frames to MP4: what players need of the file, read back with the ffmpeg that wrote it."""

import io
import re
import signal
import subprocess
import tempfile

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from distill.student import Video
from tests.clips import decode
from tests.footage import film, frames_of
from worker.video import EncodingError, Mp4Writer, encode_mp4, encode_thumbnail, read_input


@pytest.fixture
def frames():
    """A bright square that moves over a gradient, 17 frames."""
    made = np.zeros((17, 64, 64, 3), np.uint8)
    made[..., 0] = np.linspace(40, 160, 64, dtype=np.uint8)
    for t in range(17):
        made[t, 20:40, 2 * t : 2 * t + 20] = (230, 40, 40)
    return made


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """``fake_ffmpeg(script)``: from now on ffmpeg is this."""

    def install(script: str) -> None:
        fake = tmp_path / "ffmpeg"
        fake.write_text(f"#!/bin/bash\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr("worker.video.imageio_ffmpeg.get_ffmpeg_exe", lambda: str(fake))

    return install


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
def test_what_ffmpeg_did_not_finish_is_an_error(frames, fake_ffmpeg, script):
    fake_ffmpeg(f"cat >/dev/null\n{script}")
    with pytest.raises(EncodingError, match=r"ffmpeg ended with [01]: "):
        encode_mp4(frames, fps=8)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_frames_that_come_in_pieces_give_the_same_bytes(frames, temporary):
    with Mp4Writer(64, 64, 8) as writer:
        writer.write(frames[:1])
        for first in range(1, 17, 4):
            writer.write(frames[first : first + 4])
        assert writer.finish() == encode_mp4(frames, fps=8)
    assert not list(temporary.iterdir())


def test_frames_that_lie_scattered_in_memory_are_put_in_order(frames):
    scattered = np.asfortranarray(frames)
    assert encode_mp4(scattered, fps=8) == encode_mp4(frames, fps=8)


def test_whoever_gives_up_leaves_nothing_behind(frames, temporary):
    with pytest.raises(KeyError), Mp4Writer(64, 64, 8) as writer:
        writer.write(frames[:4])
        process = writer._ffmpeg
        raise KeyError
    assert process.returncode == -signal.SIGKILL
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("step", ["write", "finish"])
def test_whoever_waits_for_ffmpeg_may_give_up(frames, temporary, fake_ffmpeg, monkeypatch, step):
    fake_ffmpeg({"write": "exec sleep 60", "finish": "cat >/dev/null; exec sleep 60"}[step])
    monkeypatch.setattr("worker.video._LOOK_S", 0.05)

    def give_up():
        raise KeyError

    with pytest.raises(KeyError), Mp4Writer(64, 64, 8, look=give_up) as writer:
        writer.write(np.concatenate([frames] * 2))  # more than the pipe holds
        assert step == "finish"
        writer.finish()
    assert not list(temporary.iterdir())


def test_an_ffmpeg_that_ends_half_way_is_an_error_that_says_why(frames, temporary, fake_ffmpeg):
    fake_ffmpeg("head -c 9 >/dev/null; echo no space left >&2; exit 3")
    with pytest.raises(EncodingError, match="ffmpeg ended with 3: no space left"), Mp4Writer(64, 64, 8) as writer:
        while True:
            writer.write(frames)
    assert not list(temporary.iterdir())


def test_a_missing_ffmpeg_leaves_nothing_behind(temporary, monkeypatch):
    monkeypatch.setattr("worker.video.imageio_ffmpeg.get_ffmpeg_exe", lambda: "/no/ffmpeg")
    with pytest.raises(FileNotFoundError), Mp4Writer(64, 64, 8):
        pass
    assert not list(temporary.iterdir())


def test_a_thumbnail_is_the_frame(frames):
    with Image.open(io.BytesIO(encode_thumbnail(frames[8]))) as image:
        assert image.format == "JPEG"
        assert np.abs(np.asarray(image).astype(int) - frames[8].astype(int)).mean() < 6


def test_a_video_to_start_from_is_read_as_it_is():
    mp4 = film()
    read = read_input(mp4, Video(width=96, height=64, num_frames=17, fps=8))
    assert np.array_equal(read, frames_of(mp4))


def test_one_that_was_kept_for_another_model_is_fitted():
    mp4 = film(seconds=2, fps=8)
    read = read_input(mp4, Video(width=32, height=32, num_frames=13, fps=4))
    assert read.shape == (13, 32, 32, 3)
    # Twice as far from frame to frame, cropped to the middle, and at its end it stays.
    near = np.stack([np.asarray(Image.fromarray(one[:, 16:80]).resize((32, 32))) for one in frames_of(mp4)[::2]])
    assert np.abs(read[:8].astype(int) - near).mean() < 1
    assert np.array_equal(read[8], read[12])


@pytest.mark.parametrize("mp4", [b"", film()[:1500], b"no video"])
def test_one_that_cannot_be_read_is_an_error_that_says_so(mp4):
    with pytest.raises(EncodingError, match="the video to start from cannot be read"):
        read_input(mp4, Video(width=96, height=64, num_frames=17, fps=8))
