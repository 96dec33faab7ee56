"""`distill vbench`: what is said where VBench is absent, and how it is called where it is there.

VBench itself never ran here. Its stand-in has the signatures of vbench 0.1.5 and writes what that writes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from distill.__main__ import main
from distill.vbench import FIDELITY, QUALITY, WEIGHTS

PACKAGE = """
import json, os


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.output_path = device, output_path

    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False,
                 mode="vbench_standard", **kwargs):
        print("device", self.device, "in", os.environ["VBENCH_CACHE_DIR"], os.getcwd())
        if "broken.mp4" in os.listdir(videos_path):
            raise RuntimeError("moov atom not found")
        assert local and mode == "custom_input", "it would download, or want its own prompts"
        each = [{"video_path": os.path.join(videos_path, v), "video_results": bool(i % 2)}
                for i, v in enumerate(sorted(os.listdir(videos_path)))]
        results = {d: [0.25 + n / 10, each] for n, d in enumerate(dimension_list)}
        with open(os.path.join(self.output_path, name + "_eval_results.json"), "w") as file:
            json.dump(results, file)
"""
PICTURES = """
from vbench import VBench


class VBenchI2V(VBench):
    def evaluate(self, videos_path, name, dimension_list=None, custom_image_folder=None, mode="vbench_standard",
                 local=False, read_frame=False, resolution="1-1", **kwargs):
        assert custom_image_folder is not None
        super().evaluate(videos_path, name, dimension_list=dimension_list, local=local, mode=mode)
"""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a boat-0.mp4", "a boat-1.mp4"):
        (folder / name).write_bytes(b"")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package, text in (("vbench", PACKAGE), ("vbench2_beta_i2v", PICTURES), ("dreamsim", "")):
        (tmp_path / "site" / package).mkdir(parents=True)
        (tmp_path / "site" / package / "__init__.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))


def weights(cache: Path) -> None:
    for files in WEIGHTS.values():
        for file in files:
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            (cache / file).touch()


def line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_where_it_is_absent_one_line_says_how_to_get_it(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This Python really has no vbench."""
    assert main(["vbench", str(videos), "--out", str(tmp_path / "out")]) == 2
    said = line(capsys)
    assert f"{sys.executable} has no vbench: make an environment" in said
    assert "pip install vbench" in said
    assert main(["vbench", str(videos), "--python", "/no/such/python"]) == 2
    assert "--python /no/such/python does not run" in line(capsys)
    assert main(["vbench", str(tmp_path)]) == 2
    assert "holds no .mp4" in line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("installed")
def test_missing_weights_are_named_and_not_fetched(
    videos: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(cache)
    (cache / "raft_model/models/raft-things.pth").unlink()
    assert main(["vbench", str(videos), "--out", str(tmp_path / "out")]) == 2
    said = line(capsys)
    assert f"{cache} has no raft_model/models/raft-things.pth;" in said
    assert "VBENCH_CACHE_DIR" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("installed")
def test_it_is_called_as_it_wants_to_be(
    videos: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(cache)
    out, images = tmp_path / "out", tmp_path / "images"
    images.mkdir()
    asked = ["vbench", str(videos), "--out", str(out), "--images", str(images)]
    assert main(asked) == 2
    assert "has no a boat.png or .jpg for a boat-0.mp4" in line(capsys)
    (images / "a boat.png").touch()
    assert main(asked) == 0
    judged = json.loads((out / "vbench.json").read_text())
    assert list(judged["means"]) == [*QUALITY, *FIDELITY]
    assert judged["means"]["dynamic_degree"] == 0.35
    assert judged["videos"]["i2v_subject"] == {"a boat-0.mp4": 0.0, "a boat-1.mp4": 1.0}
    assert (
        "| average of motion_smoothness, dynamic_degree, aesthetic_quality, imaging_quality | 0.4000 |"
        in (out / "vbench.md").read_text()
    )
    assert f"in {cache} {os.path.realpath(cache)}" in (out / "vbench.log").read_text()

    (videos / "broken.mp4").touch()
    capsys.readouterr()
    assert main(["vbench", str(videos), "--out", str(out)]) == 2
    assert "VBench ended with 1: RuntimeError: moov atom not found" in capsys.readouterr().err
