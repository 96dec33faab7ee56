"""The firewall for videos: what comes through is a clip of the model's size, what does not says why."""

import io
import subprocess
import sys
from fractions import Fraction

import av
import imageio_ffmpeg
import numpy as np
import pytest
from av.stream import Disposition

from service import clips
from service.clips import clean
from service.errors import ApiError
from tests.footage import film, frames_of, moving_square
from worker.contract import VideoSize

SIZE = VideoSize(width=64, height=64, num_frames=17, fps=8)
WANTED = np.stack([moving_square(i / 8)[:, 16:80] for i in range(17)])
"""`film` as the model takes it: the middle of each frame."""


def error_of(data: bytes, wanted: np.ndarray = WANTED) -> float:
    """In grey levels."""
    got = frames_of(clean(data, SIZE))
    assert got.shape == wanted.shape
    return float(np.abs(got.astype(int) - wanted).mean())


@pytest.mark.parametrize(
    ("codec", "container"),
    [
        ("libx264", "mp4"),
        ("libx264", "mov"),
        ("libx264", "matroska"),
        ("libx265", "mp4"),
        ("libvpx", "webm"),
        ("libvpx-vp9", "webm"),
        ("libsvtav1", "mp4"),
    ],
)
def test_each_codec_and_container_becomes_a_clip_of_the_models_size(codec, container):
    assert error_of(film(codec, container, sound=container != "mov")) < 2


@pytest.mark.parametrize(("seconds", "fps"), [(3, 30), (2.2, 12), (4, 8), (2.01, 100)])
def test_another_rate_is_brought_to_the_models_and_what_is_too_long_is_cut(seconds, fps):
    # The square moves by 16 pixels a second: half a frame too early or too late is seen.
    assert error_of(film(seconds=seconds, fps=fps)) < 3


def test_of_each_moment_the_nearest_frame_is_taken():
    """Ten frames a second, each ten levels brighter than the one before, at eight a second."""

    def brighter(second, width, height):
        return np.full((height, width, 3), 10 * round(10 * second), np.uint8)

    levels = frames_of(clean(film(seconds=2.3, fps=10, draw=brighter), SIZE)).mean((1, 2, 3))
    assert [round(level / 10) for level in levels] == [int(10 * i / 8 + 0.5) for i in range(17)]


def test_a_tall_video_is_cropped_around_its_centre():
    def stripe(_second, width, height):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[height // 2 - 8 : height // 2 + 8] = 255
        return frame

    frames = frames_of(clean(film(width=64, height=160, draw=stripe), SIZE)).astype(int)
    assert frames[:, 26:38].min() > 230
    assert frames[:, :22].max() < 25


def test_pixels_that_are_not_square_are_shown_as_they_are_meant():
    wide = film(width=48, pixel_aspect=Fraction(2), draw=lambda second, *_: moving_square(second)[:, ::2])
    assert error_of(wide) < 8


def test_a_phones_video_is_turned_upright(tmp_path):
    (tmp_path / "in.mp4").write_bytes(film())
    turn = ["-display_rotation", "90", "-i", tmp_path / "in.mp4", "-c", "copy", tmp_path / "turned.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *turn], check=True)
    upright = np.rot90(np.stack([moving_square(i / 8) for i in range(17)]), axes=(1, 2))
    assert error_of((tmp_path / "turned.mp4").read_bytes(), upright[:, 16:80]) < 2


def test_nothing_but_the_picture_survives():
    out = io.BytesIO()
    with av.open(io.BytesIO(film(sound=True))) as before, av.open(out, "w", format="mp4") as after:
        after.metadata["title"] = "my secret"
        streams = {stream.index: after.add_stream_from_template(stream) for stream in before.streams}
        for packet in before.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                after.mux(packet)
    assert b"my secret" in out.getvalue()
    result = clean(out.getvalue() + b"<script>hidden</script>", SIZE)
    assert b"secret" not in result
    assert b"hidden" not in result
    with av.open(io.BytesIO(result)) as container:
        assert [stream.type for stream in container.streams] == ["video"]


def test_the_same_video_gives_the_same_bytes_and_a_clip_of_the_right_size_changes_little():
    once = clean(film(), SIZE)
    assert clean(film(), SIZE) == once
    assert error_of(once, frames_of(once)) < 1


# --- what is refused --------------------------------------------------------------------------------------------------


def plain(_second, width, height) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def lying() -> bytes:
    """A WEBM whose header says 96 x 64, and whose frames are of ten million pixels."""
    data = film("libvpx", "webm", width=4200, height=2400, seconds=0.25, draw=plain, options={"deadline": "realtime"})
    for name, real, said in ((b"\xb0", 4200, 96), (b"\xba", 2400, 64)):
        field = name + b"\x82" + real.to_bytes(2, "big")
        assert data.count(field) == 1
        data = data.replace(field, name + b"\x82" + said.to_bytes(2, "big"))
    return data


def only_sound(*, cover: bool) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        audio = file.add_stream("aac", rate=48000)
        if cover:
            picture = file.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 96, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            file.mux(picture.encode(av.VideoFrame.from_ndarray(moving_square(0), format="rgb24")))
        for number in range(100):
            heard = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            heard.sample_rate, heard.pts = 48000, number * 1024
            file.mux(audio.encode(heard))
        file.mux(audio.encode(None))
    return out.getvalue()


def changing() -> bytes:
    """A VP8 stream that becomes another size on its way."""
    out = io.BytesIO()
    with av.open(out, "w", format="webm") as file:
        stream = file.add_stream("libvpx", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number, part in enumerate(
            (film("libvpx", "webm", seconds=1), film("libvpx", "webm", width=128, height=128))
        ):
            with av.open(io.BytesIO(part)) as one:
                for packet in one.demux(video=0):
                    if packet.dts is not None:
                        packet.stream = stream
                        packet.pts = packet.dts = packet.pts + 1000 * number
                        file.mux(packet)
    return out.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"


@pytest.mark.parametrize(
    ("make", "status", "code", "says"),
    [
        pytest.param(lambda: b"", 422, "video_empty", "empty", id="empty"),
        pytest.param(lambda: b"GIF89a" + b"\0" * 40, 415, "video_format", "begins with 47 49 46", id="gif"),
        pytest.param(lambda: PLAYLIST, 415, "video_format", "not an MP4", id="playlist"),
        pytest.param(lambda: CONCAT, 415, "video_format", "not an MP4", id="concat"),
        pytest.param(
            lambda: b"\0\0\0\x18ftypmp42" + PLAYLIST, 422, "video_damaged", "damaged", id="disguised-playlist"
        ),
        pytest.param(lambda: b"\x1aE\xdf\xa3" + CONCAT * 20, 422, "video_damaged", "damaged", id="disguised-concat"),
        pytest.param(
            lambda: b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 40, 422, "video_damaged", "damaged", id="noise"
        ),
        pytest.param(lambda: film()[:1500], 422, "video_no_stream", "cut short", id="cut-short"),
        pytest.param(lambda: only_sound(cover=False), 422, "video_no_stream", "sound alone", id="only-sound"),
        pytest.param(
            lambda: only_sound(cover=True), 422, "video_no_stream", "a picture alone", id="sound-with-a-cover"
        ),
        pytest.param(lambda: film("mpeg4"), 422, "video_codec", "codec is mpeg4; wanted H.264", id="mpeg4"),
        pytest.param(lambda: film("ffv1", "matroska"), 422, "video_codec", "codec is ffv1", id="ffv1"),
        pytest.param(lambda: film(width=64, height=8), 422, "video_too_small", "64 x 8 pixels", id="too-small"),
        pytest.param(lambda: film(seconds=61, fps=1), 422, "video_too_long", "lasts 61 s; at most 60", id="too-long"),
        pytest.param(
            lambda: film(seconds=1.5), 422, "video_too_short", "lasts 1.5 s; this model makes 2.125", id="too-short"
        ),
        pytest.param(lambda: film(seconds=0.125), 422, "video_too_short", "so send as much", id="one-frame"),
        pytest.param(changing, 422, "video_damaged", "changes from 96 x 64 to 128 x 128", id="changing-size"),
    ],
)
def test_what_is_refused_says_why(make, status, code, says):
    with pytest.raises(ApiError) as caught:
        clean(make(), SIZE)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "video")
    assert says in caught.value.message


def test_frames_of_millions_of_pixels_are_not_decoded():
    big = film(width=4200, height=2400, seconds=0.25, draw=plain, options={"preset": "ultrafast"})
    with pytest.raises(ApiError, match="4200 x 2400; at most 8294400 pixels"):
        clean(big, SIZE)


def test_nor_are_those_that_the_header_says_nothing_of():
    with pytest.raises(ApiError) as caught:
        clean(lying(), SIZE)
    assert caught.value.code == "video_damaged"  # by the decoder itself: `video_too_large` would be after it


def test_thousands_of_frames_a_second_are_not_decoded():
    dense = film(seconds=2.1, fps=1000, width=16, height=16, options={"preset": "ultrafast"}, draw=plain)
    with pytest.raises(ApiError, match="more than 2000 frames"):
        clean(dense, SIZE)


def test_what_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(clips, "_WALL_S", 0.01)
    with pytest.raises(ApiError) as caught:
        clean(film(), SIZE)
    assert caught.value.code == "video_too_complex"


def test_when_too_many_are_read_at_once_the_next_is_told_to_come_back(monkeypatch):
    monkeypatch.setattr(clips, "_PATIENCE_S", 0.01)
    with clips._DECODING, pytest.raises(ApiError) as caught:
        clean(film(), SIZE)
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "5")
    assert clean(film(), SIZE)


CONFINED = """
import socket
from service import transcode
transcode._confine()
for attempt in (lambda: open("/etc/passwd"), socket.socket, lambda: bytearray(2 << 30)):
    try:
        attempt()
        print("could", end=" ")
    except (OSError, MemoryError) as error:
        print(type(error).__name__, end=" ")
"""


def test_the_decoder_can_open_nothing_and_take_no_more_memory_than_it_may():
    said = subprocess.run([sys.executable, "-c", CONFINED], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["OSError", "OSError", "MemoryError"]
