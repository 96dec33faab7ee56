"""`distill prepare` and `merge`: from real video files to what the stages read."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from distill import student
from distill.__main__ import main
from distill.adopt import adopt
from distill.backbones import base
from distill.config import AdoptConfig, ConfigError, FiltersConfig, PrepareConfig, override
from distill.data import prepared, shapes, videos
from distill.data.prepared import DataError, Dataset
from distill.data.videos import Clip, Item, Rejected, Wanted
from distill.encoders import Encoders
from distill.latents import Latents
from distill.loop import Run
from distill.prepare import _read_clips, _save, _seed, merge, prepare
from tests.tiny import wan

CLIPS = 5
CONFIG = override(PrepareConfig(), ["clips_per_file=2", "held_out=0.3"])
Drawn = tuple[list[str], np.ndarray]
WANTED = Wanted(64, 64, 17, 8, FiltersConfig())


def write_video(path: Path, frames_THWC: np.ndarray, fps: int = 8, codec: str = "libx264") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options={"crf": "15"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame_HWC in frames_THWC:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def read(path: Path, start_s: float = 0.0, wanted: Wanted = WANTED) -> Clip | Rejected:
    return videos.read_clip(Item(0, "a caption", path.name, None, start_s, str(path.parent)), wanted)


def reason(got: Clip | Rejected) -> str:
    assert isinstance(got, Rejected), "it was taken"
    return got.reason


def of_kind(folder: Path) -> dict[str, bytes]:
    """Every file of the result."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    """Captions, and frames ``[N, T, H, W, C]``."""
    captions, scene = shapes.sample(0, range(CLIPS + 1))
    video_NCTHW = shapes.render(scene)
    return [str(c) for c in captions], ((video_NCTHW + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> Path:
    """Five videos that can be used, and one for each reason that they may not be."""
    folder = tmp_path_factory.mktemp("source")
    captions, frames = drawn
    for number in range(CLIPS):
        write_video(folder / f"{number}.mp4", frames[number])
    write_video(folder / "a-cut.mp4", np.concatenate([frames[0][:8], frames[1][8:]]))
    write_video(folder / "copy.mp4", (frames[0].astype(int) + 9).clip(0, 255).astype(np.uint8))
    write_video(folder / "short.mp4", frames[0][:12])
    write_video(folder / "small.mp4", frames[0][:, :48, :48])
    write_video(folder / "slow.mp4", frames[0], fps=5)
    write_video(folder / "static.mp4", np.repeat(frames[0][:1], 17, axis=0))
    write_video(folder / "silent.mp4", frames[5])
    write_video(folder / "odd.mp4", frames[5])
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:700])
    for path in folder.glob("*.mp4"):
        number = int(path.stem) if path.stem.isdigit() else 0
        path.with_suffix(".txt").write_text(captions[number] + "\n")
    (folder / "silent.txt").unlink()
    (folder / "odd.txt").write_text("a red elephant dances")
    return folder


@pytest.fixture(scope="module")
def card(tiny_teacher: Path) -> student.Card:
    return student.read_card(tiny_teacher)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, tiny_teacher: Path) -> Path:
    return prepare(source, tmp_path_factory.mktemp("prepared") / "whole", tiny_teacher, CONFIG, workers=1)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    """To damage."""
    return Path(shutil.copytree(whole, tmp_path / "copied"))


# --- frames -----------------------------------------------------------------------------------------------------------


def test_frames_are_those_of_the_model_s_moments(drawn: Drawn, tmp_path: Path) -> None:
    frames_THWC = drawn[1][1]
    same = read(write_video(tmp_path / "same.mp4", frames_THWC))
    # Three times the rate, every third frame the right one; and 2 s of others before.
    others_THWC = np.repeat(255 - frames_THWC, 3, axis=0)
    others_THWC[::3] = frames_THWC
    fast = read(write_video(tmp_path / "fast.mp4", others_THWC, fps=24))
    late = read(write_video(tmp_path / "late.mp4", np.concatenate([255 - frames_THWC[:16], frames_THWC])), start_s=2.0)
    for got in (same, fast, late):
        assert isinstance(got, Clip)
        assert np.abs(got.frames_THWC.astype(int) - frames_THWC).mean() < 6


def test_size_is_covered_and_cropped_about_the_centre(tmp_path: Path) -> None:
    frames_THWC = np.zeros((17, 128, 256, 3), np.uint8)
    frames_THWC[:, :, 64:192, 0] = 200  # what a square crop shows
    frames_THWC[:, :, 64:192, 1] = np.linspace(0, 200, 17).astype(np.uint8)[:, None, None]
    got = read(write_video(tmp_path / "wide.mp4", frames_THWC))
    assert isinstance(got, Clip)
    assert got.frames_THWC.shape == (17, 64, 64, 3)
    assert got.frames_THWC[..., 0].min() > 150

    tall = read(write_video(tmp_path / "tall.mp4", frames_THWC.transpose(0, 2, 1, 3)))
    assert isinstance(tall, Clip)
    assert tall.frames_THWC[..., 0].min() > 150

    # A telephone held upright: wide frames, and a note that they are to be turned.
    top_THWC = frames_THWC.copy()
    top_THWC[:, :, :128, 2] = 250
    plain = write_video(tmp_path / "plain.mp4", top_THWC)
    turned = tmp_path / "turned.mp4"
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    turn = [ffmpeg, "-loglevel", "error", "-display_rotation", "90", "-i", str(plain), "-c", "copy", str(turned)]
    subprocess.run(turn, check=True)
    got = read(turned, wanted=Wanted(32, 64, 17, 8, FiltersConfig()))
    assert isinstance(got, Clip)
    # Turned by 90 degrees counterclockwise the left half is the lower one.
    assert got.frames_THWC[:, 40:, :, 2].mean() > 200
    assert got.frames_THWC[:, :24, :, 2].mean() < 50


def test_a_video_that_hangs_or_kills_its_decoder_costs_itself_alone(source: Path, tmp_path: Path) -> None:
    """A pipe that nobody writes to blocks whoever opens it."""
    os.mkfifo(tmp_path / "hangs.mp4")
    os.mkfifo(tmp_path / "dies.mp4")
    shutil.copy(source / "0.mp4", tmp_path / "fine.mp4")
    items = [Item(i, "c", name, None, 0.0, str(tmp_path)) for i, name in enumerate(["hangs.mp4", "fine.mp4"])]
    found = list(_read_clips([(item, None) for item in items], WANTED, workers=1, timeout_s=1.5))
    assert reason(found[0][1]) == "unreadable"
    assert "decode_timeout_s" in found[0][1].detail
    assert isinstance(found[1][1], Clip)

    def kill_who_waits() -> None:
        for _ in range(200):
            for child in psutil.Process().children(recursive=True):
                if "spawn_main" in " ".join(child.cmdline()):
                    time.sleep(1.0)  # it imports first
                    child.kill()
                    return
            time.sleep(0.05)

    items = [Item(i, "c", name, None, 0.0, str(tmp_path)) for i, name in enumerate(["dies.mp4", "fine.mp4"])]
    threading.Thread(target=kill_who_waits, daemon=True).start()
    found = list(_read_clips([(item, None) for item in items], WANTED, workers=1, timeout_s=60))
    assert "crashed" in found[0][1].detail
    assert isinstance(found[1][1], Clip)


# --- sources ----------------------------------------------------------------------------------------------------------


def test_tables_say_what_a_folder_says(source: Path, tmp_path: Path) -> None:
    of_folder = videos.read_source(source)
    rows = [{"path": str(item.path(item.video)), "text": item.caption} for item in of_folder]
    with (tmp_path / "list.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["path", "text"])
        table.writeheader()
        table.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "list.parquet")
    for name in ("list.csv", "list.parquet"):
        of_table = videos.read_source(tmp_path / name)
        assert [item.caption for item in of_table] == [item.caption for item in of_folder]
        assert [item.path(item.video) for item in of_table] == [item.path(item.video) for item in of_folder]
    (tmp_path / "captions.txt").write_text("one\n\n two \n")
    assert [item.caption for item in videos.read_source(tmp_path / "captions.txt")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("nothing", None, "there is no such file"),
        ("list.csv", "video,words\na.mp4,x\n", "no column of captions, only: video, words"),
        ("list.csv", "video,caption\n,x\n", "row 1: no video"),
        ("list.csv", "video,caption,start_s\na.mp4,x,soon\n", "start_s is 'soon'"),
        ("list.csv", "video,caption\n", "holds no row"),
        ("list.parquet", "no parquet", "no Parquet file that can be read"),
        ("list.json", "[]", "what ends in .json is not read"),
        ("captions.txt", "a red circle drifts\n", "captions without pictures"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_line(
    name: str, text: str | None, wanted: str, tmp_path: Path, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["prepare", str(tmp_path / name), str(tmp_path / "out"), "--model", str(tiny_teacher)]) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- what is made -----------------------------------------------------------------------------------------------------


def test_each_line_is_taken_or_refused_for_its_reason(whole: Path, drawn: Drawn) -> None:
    with (whole / "rejected.csv").open(newline="") as file:
        refused = {line["source"]: line["reason"] for line in csv.DictReader(file)}
    assert refused == {
        "a-cut.mp4": "scene cut",
        "broken.mp4": "unreadable",
        "copy.mp4": "near-duplicate",
        "odd.mp4": "caption not understood",
        "short.mp4": "too short",
        "silent.mp4": "no caption",
        "slow.mp4": "low frame rate",
        "small.mp4": "too small",
        "static.mp4": "static",
    }
    index = prepared.read_index(whole)
    rows = prepared.read_rows(whole, index)
    assert [row.source for row in rows] == [f"{number}.mp4" for number in range(CLIPS)]
    assert [row.caption for row in rows] == drawn[0][:CLIPS]
    assert index.counts["train"] + index.counts["dev"] == CLIPS
    assert json.loads((whole / "report.json").read_text())["counts"]["clips"] == CLIPS
    assert "| static | 1 |" in (whole / "report.md").read_text()


def test_what_is_read_is_what_the_encoders_make(
    whole: Path, source: Path, card: student.Card, tiny_teacher: Path
) -> None:
    backbone = base.load(card.backbone, card.task)
    pipe = student.load_pipeline(tiny_teacher, "cpu")
    train, dev = Dataset(whole, card), Dataset(whole, card, "dev")
    assert len(train) + len(dev) == CLIPS
    assert len(Dataset(whole, card, count=1)) == 1
    rows_B = torch.tensor([2, 0])
    got = train.batch(rows_B)
    assert got.captions == [train.captions[2], train.captions[0]]
    sources = {row.caption: row.source for row in prepared.read_rows(whole, train.index)}
    clips = [read(source / sources[caption]) for caption in got.captions]
    video_BTHWC = np.stack([clip.frames_THWC for clip in clips if isinstance(clip, Clip)])
    video_BCTHW = torch.from_numpy(video_BTHWC).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        x0_BCTHW = backbone.encode_video(pipe.vae, video_BCTHW)
        image = backbone.encode_image(pipe, video_BCTHW[:, :, 0], card.call)
        text = backbone.encode_text(pipe, got.captions, card.call, video_BCTHW[:, :, 0])
        negative = backbone.encode_text(pipe, ["", ""], card.call)
    assert got.x0_BCTHW is not None
    assert got.x0_BCTHW.dtype == torch.float16
    torch.testing.assert_close(got.x0_BCTHW.float(), x0_BCTHW, rtol=1e-3, atol=2e-3)
    for name, value in backbone.image_of(got.x0_BCTHW.float(), got.image).items():
        torch.testing.assert_close(value, image[name], rtol=1e-3, atol=2e-3)
    assert text.keys() == got.text.keys() == got.negative.keys()
    with safe_open(whole / "clips-00000.safetensors", framework="pt") as file:  # the negative prompt's is kept once
        assert {name.split("/")[1] for name in file.keys()} == {"x0", *(f"text.{name}" for name in text)}
    for name in text:
        torch.testing.assert_close(got.text[name].float(), text[name], rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(got.negative[name].float(), negative[name], rtol=1e-3, atol=2e-3)


def test_the_order_depends_on_seed_and_number_alone(whole: Path, card: student.Card, run: Run, tmp_path: Path) -> None:
    train = Dataset(whole, card)
    count = len(train)
    order = [train.rows(run, number, 1).item() for number in range(3 * count)]
    epochs = [tuple(order[first : first + count]) for first in range(0, 3 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len(set(epochs)) > 1
    again, other = Run(tmp_path / "again", run.seed), Run(tmp_path / "other", run.seed + 1)
    with again.handling_signals(), other.handling_signals():
        assert [train.rows(again, number, 1).item() for number in reversed(range(3 * count))] == order[::-1]
        assert [train.rows(other, number, 1).item() for number in range(3 * count)] != order
    like = Latents(torch.zeros(count, 1, 1, 1, 1), train.captions)
    assert all(torch.equal(like.rows(run, number, 2), train.rows(run, number, 2)) for number in range(9))


def test_more_videos_move_none_to_the_other_split() -> None:
    names = [f"clips/{number}.mp4" for number in range(4000)]
    out = [videos.held_out(name, 0.1) for name in names]
    assert 320 < sum(out) < 480
    assert all(videos.held_out(name, 0.2) for name, was in zip(names, out, strict=True) if was)


# --- going on ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_one_goes_on_to_the_same_bytes(
    whole: Path,
    source: Path,
    tiny_teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    settings = [part for name in ("clips_per_file=2", "held_out=0.3") for part in ("--set", name)]
    command = ["prepare", str(source), str(out), "--model", str(tiny_teacher), *settings]

    def save_and_stop(path: Path, tensors: dict[str, torch.Tensor]) -> prepared.File:
        if path.name == "clips-00001.safetensors":
            os.kill(os.getpid(), signal.SIGTERM)
        return _save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr("distill.prepare._save", save_and_stop)
        assert main(command) == 75
    assert "goes on" in capsys.readouterr().err
    assert not (out / "index.json").exists()
    with pytest.raises(DataError, match="is not finished; give the same"):
        prepared.read_index(out)
    assert sorted(path.name for path in (out / "run").glob("part-*")) == ["part-00000.json", "part-00001.json"]
    with pytest.raises(ConfigError, match="begun with other settings"):
        prepare(source, out, tiny_teacher, override(CONFIG, ["held_out=0.5"]))

    # As if it had been killed while it wrote: a part that is said to be there and is not, and half a file.
    (out / "clips-00001.safetensors").unlink()
    (out / "clips-00001.tmp").write_bytes(b"half a file")
    before = (out / "clips-00000.safetensors").stat().st_mtime_ns
    assert main([*command, "--workers", "1"]) == 0
    assert (out / "clips-00000.safetensors").stat().st_mtime_ns == before
    assert of_kind(out) == of_kind(whole)
    capsys.readouterr()
    assert main(command) == 0
    assert "finished already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_the_whole_group_is_one_to_stop(source: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """As a batch system sends it: the processes that read videos get it too, or would."""
    table, out = tmp_path / "list.csv", tmp_path / "out"
    lines = [f"{source / f'{number % CLIPS}.mp4'},a red circle drifts" for number in range(400)]
    table.write_text("video,caption\n" + "\n".join(lines) + "\n")
    settings = ["--set", "clips_per_file=1", "--set", "filters.min_difference_bits=0"]
    command = [
        sys.executable,
        "-m",
        "distill",
        "prepare",
        str(table),
        str(out),
        "--model",
        str(tiny_teacher),
        *settings,
    ]
    started = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (out / "run" / "part-00001.json").exists():
            break
        time.sleep(0.05)
    children = psutil.Process(started.pid).children()
    readers = [child.pid for child in children if "spawn_main" in " ".join(child.cmdline())]
    groups = [os.getpgid(reader) for reader in readers]
    os.killpg(started.pid, signal.SIGTERM)
    assert groups
    assert started.pid not in groups
    _, said = started.communicate(timeout=60)
    assert (started.returncode, said.splitlines()[-1]) == (75, f"interrupted; the same command goes on from {out}")
    assert not [part for part in (out / "run").glob("part-*") if "crashed" in part.read_text()]


def test_another_source_or_a_strange_folder_is_refused(
    source: Path, tiny_teacher: Path, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"differ in: source_sha256"):
        other = Path(shutil.copytree(source, tmp_path / "other"))
        (other / "0.txt").write_text("a red circle drifts")
        prepare(other, whole, tiny_teacher, CONFIG)
    with pytest.raises(ConfigError, match="did not begin it"):
        prepare(source, source, tiny_teacher, CONFIG)
    with pytest.raises(ConfigError, match="take fewer shards"):
        prepare(source, tmp_path / "out", tiny_teacher, CONFIG, shard=(99, 99))
    assert not (tmp_path / "out").exists()


def test_nothing_of_use_is_an_error_that_counts(source: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(source / "silent.mp4", alone)
    with pytest.raises(DataError, match=r"no line of the source gave a clip \(no caption: 1\)"):
        prepare(alone, tmp_path / "out", tiny_teacher, CONFIG, workers=1)
    assert not (tmp_path / "out" / "index.json").exists()


# --- many machines ----------------------------------------------------------------------------------------------------


def test_shards_are_joined_to_what_one_machine_makes(
    whole: Path, source: Path, card: student.Card, tiny_teacher: Path, tmp_path: Path
) -> None:
    parts = [prepare(source, tmp_path / f"{i}", tiny_teacher, CONFIG, 1, shard=(i, 2)) for i in (1, 2)]
    with pytest.raises(DataError, match="the shards 1/2; name each of 1/2, 2/2 once"):
        merge(tmp_path / "out", parts[:1])
    assert not (tmp_path / "out").exists()
    joined = merge(tmp_path / "out", parts[::-1])
    for split in ("train", "dev"):
        one, many = Dataset(whole, card, split), Dataset(joined, card, split)
        assert one.captions == many.captions
        every = torch.arange(len(one))
        assert torch.equal(one.batch(every).x0_BCTHW, many.batch(every).x0_BCTHW)
        assert torch.equal(one.batch(every).text["text"], many.batch(every).text["text"])
    counts = [prepared.read_index(folder).counts for folder in (whole, joined)]
    assert counts[0] == counts[1]  # the copy is found again where its original was another machine's

    again = tmp_path / "again"
    shutil.copytree(whole, again)
    index = json.loads((again / "index.json").read_text())
    (again / "index.json").write_text(json.dumps({**index, "source_sha256": ["another"]}))
    twice = prepared.read_index(merge(tmp_path / "twice", [whole, again]))
    assert twice.counts["near-duplicate"] == 2 + CLIPS
    (again / "index.json").write_text(json.dumps({**index, "video": {**index["video"], "fps": 16}}))
    with pytest.raises(DataError, match="differ in video"):
        merge(tmp_path / "third", [whole, again])


# --- refused when read ------------------------------------------------------------------------------------------------


def test_data_of_another_model_is_refused(whole: Path, card: student.Card) -> None:
    def other(**update: object) -> student.Card:
        return card.model_copy(update=update)

    vae = next(name for name in card.files if name.startswith("vae/"))
    transformer = next(name for name in card.files if name.startswith("transformer/"))
    for changed, wanted in [
        (other(backbone="wan-i2v"), "backbone wan, and tiny-teacher has wan-i2v"),
        (other(files={**card.files, vae: "0" * 64}), "encoder vae"),
        (other(video=card.video.model_copy(update={"num_frames": 33})), "video num_frames 17, and .* has 33"),
        (other(call={**card.call, "max_sequence_length": 64}), "call max_sequence_length 32, and .* has 64"),
        (other(call={**card.call, "negative_prompt": "blurred"}), "call negative_prompt None, and .* has blurred"),
    ]:
        with pytest.raises(DataError, match=wanted) as raised:
            Dataset(whole, changed)
        assert "\n" not in str(raised.value)
        assert "prepare the videos again" in str(raised.value)
    # A student, or another teacher with the same encoders, reads the same data.
    Dataset(whole, other(name="else", files={**card.files, transformer: "0" * 64}))


def test_damage_is_found(copied: Path, card: student.Card) -> None:
    rows = prepared.read_rows(copied, prepared.read_index(copied))
    row = next(number for number, row in enumerate(r for r in rows if r.split == "train"))
    name = next(row.file for row in rows if row.split == "train")
    file = copied / name
    Dataset(copied, card).batch(torch.tensor([row]))
    assert (copied / "run" / f"{name}.checked").exists()

    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    opened = Dataset(copied, card)
    with pytest.raises(DataError, match="was changed after it was written"):
        opened.batch(torch.tensor([row]))
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes, and index.json says \d+; copy"):
        Dataset(copied, card)
    file.unlink()
    with pytest.raises(DataError, match=f"{name} is missing"):
        Dataset(copied, card)
    (copied / "clips.jsonl").unlink()
    with pytest.raises(DataError, match=r"clips\.jsonl is missing"):
        Dataset(copied, card)
    shutil.rmtree(copied / "run")
    (copied / "index.json").unlink()
    with pytest.raises(DataError, match="is no prepared data set"):
        Dataset(copied, card)


def test_a_split_without_clips_says_what_to_do(copied: Path, card: student.Card) -> None:
    lines = [line for line in (copied / "clips.jsonl").read_text().splitlines(keepends=True) if '"train"' in line]
    (copied / "clips.jsonl").write_text("".join(lines))
    index = prepared.read_index(copied)
    files = tuple(prepared.describe(copied / file.name) for file in index.files)
    (copied / "index.json").write_text(index.model_copy(update={"files": files}).model_dump_json())
    with pytest.raises(DataError, match=r"no clip in the dev split .* --set held_out"):
        Dataset(copied, card, "dev")


# --- captions alone ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> Path:
    """A table of captions and first frames, one of them twice."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.fromarray(drawn[1][number][0]).save(folder / f"{number}.png")
    lines = [f'"{drawn[0][number]}",{number}.png' for number in (0, 1, 2, 1)]
    (folder / "list.csv").write_text("caption,image\n" + "\n".join(lines) + "\n")
    return folder / "list.csv"


def test_captions_alone_keep_all_of_the_picture_s_conditions(
    pictures: Path, drawn: Drawn, card: student.Card, tiny_teacher: Path, tmp_path: Path
) -> None:
    out = prepare(pictures, tmp_path / "out", tiny_teacher, override(CONFIG, ["held_out=0"]))
    found = Dataset(out, card)
    assert not found.has_latents
    assert len(found) == 3
    got = found.batch(torch.arange(3))
    assert got.x0_BCTHW is None
    backbone, pipe = base.load(card.backbone, card.task), student.load_pipeline(tiny_teacher, "cpu")
    first_BCHW = torch.from_numpy(drawn[1][:3, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        image = backbone.encode_image(pipe, first_BCHW, card.call)
    assert got.image.keys() == image.keys()
    for name, value in image.items():
        torch.testing.assert_close(got.image[name].float(), value, rtol=1e-3, atol=2e-3)
    assert "stage II learns from clips" in prepared.needs_latents("stage II")


def test_the_teacher_samples_clips_for_captions(
    pictures: Path, drawn: Drawn, card: student.Card, tiny_teacher: Path, source: Path, tmp_path: Path
) -> None:
    config = override(CONFIG, ["held_out=0", "from_teacher=true"])
    out = prepare(pictures, tmp_path / "out", tiny_teacher, config)
    found = Dataset(out, card)
    assert found.has_latents
    got = found.batch(torch.arange(len(found))).x0_BCTHW
    assert got is not None
    pipe = student.load_pipeline(tiny_teacher, "cpu")
    backbone = base.load(card.backbone, card.task)
    assert got.shape == (3, *backbone.latent_shape(pipe, card.call))
    assert not torch.equal(got[0], got[1])
    first_BCHW = torch.from_numpy(drawn[1][:3, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        firsts = backbone.encode_video(pipe.vae, first_BCHW[:, :, None])
    torch.testing.assert_close(got[:, :, :1].float(), firsts, rtol=1e-3, atol=2e-3)
    with pytest.raises(ConfigError, match=r"--from-teacher: .* has videos"):
        prepare(source, tmp_path / "other", tiny_teacher, config)


# --- other models -----------------------------------------------------------------------------------------------------


def adopted(variant: str, out: Path, **call: object) -> tuple[Path, student.Card]:
    settings = ["fps=8", *(f"{name}={value}" for name, value in wan.call(variant, **call).items())]
    return out, adopt(wan.folder(variant, out), override(AdoptConfig(), settings))


def test_networks_without_weights_change_nothing(tmp_path: Path, drawn: Drawn) -> None:
    """Wan2.1-I2V asks its transformer whether it sees CLIP's tokens; those, and the grey clip, are kept."""
    folder, card = adopted("i2v-14b", tmp_path / "model")
    frames_THWC = drawn[1][0][: wan.FRAMES, : wan.SIZE, : wan.SIZE]
    light = Encoders(folder, card, PrepareConfig())
    full = Encoders(folder, card, PrepareConfig(from_teacher=True))
    assert not isinstance(light.pipe.transformer, torch.nn.Module)
    made, wanted = light.of_video(frames_THWC, "a boat"), full.of_video(frames_THWC, "a boat")
    assert made.keys() == wanted.keys()
    assert {"x0", "image.beside", "image.clip", "text.text"} <= made.keys()
    for name, value in made.items():
        assert torch.equal(value, wanted[name]), name


def test_text_to_video_needs_captions_alone(tmp_path: Path) -> None:
    folder, card = adopted("t2v-1.3b", tmp_path / "model", num_inference_steps=2)
    (tmp_path / "captions.txt").write_text("a boat on a lake\na dog\n\na dog\n" + "very " * 40 + "long\n")
    settings = ["held_out=0", "clips_per_file=3"]
    plain = prepare(tmp_path / "captions.txt", tmp_path / "plain", folder, override(PrepareConfig(), settings))
    found = Dataset(plain, card)
    assert found.captions == ["a boat on a lake", "a dog", "very " * 40 + "long"]
    assert [row.truncated for row in prepared.read_rows(plain, found.index)] == [False, False, True]
    got = found.batch(torch.arange(3))
    assert (got.x0_BCTHW, got.image) == (None, {})
    assert got.text["text"].shape == got.negative["text"].shape == (3, 16, 16)

    sampling = override(PrepareConfig(), [*settings, "from_teacher=true"])
    sampled = prepare(tmp_path / "captions.txt", tmp_path / "sampled", folder, sampling)
    pipe = student.load_pipeline(folder, "cpu")
    x0_BCTHW = Dataset(sampled, card).batch(torch.arange(3)).x0_BCTHW
    assert x0_BCTHW is not None
    assert x0_BCTHW.shape == (3, *base.load(card.backbone, card.task).latent_shape(pipe, card.call))
    items = videos.read_source(tmp_path / "captions.txt")
    assert len({_seed(0, items[0]), _seed(0, items[1]), _seed(1, items[1])}) == 3
    again = prepare(tmp_path / "captions.txt", tmp_path / "again", folder, sampling)
    assert of_kind(again) == of_kind(sampled)


def test_a_text_too_large_for_half_precision_is_refused_by_name(tmp_path: Path) -> None:
    folder, card = adopted("t2v-1.3b", tmp_path / "model")
    encoders = Encoders(folder, card, PrepareConfig())
    with torch.no_grad():
        encoders.pipe.text_encoder.encoder.final_layer_norm.weight.mul_(1e6)
    with pytest.raises(ConfigError, match=r"\.text: .* does not fit float16; of a text, give --set text_dtype"):
        encoders.of_caption(None, "a boat")
    wide = Encoders(folder, card, PrepareConfig(text_dtype="bfloat16"))
    wide.pipe = encoders.pipe
    assert wide.of_caption(None, "a boat")["text.text"].dtype == torch.bfloat16
