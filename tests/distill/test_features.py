"""The classifier behind `fvd_shapes` and the distance between two sets of its features."""

import json
import subprocess
import sys

import pytest
import torch

from distill import features
from distill.data import shapes
from tests.stack import ROOT


def test_the_frechet_distance_is_that_of_two_gaussians():
    """Between N(0, I) and N(m, s^2 I) it is |m|^2 + D (1 - s)^2; features made so that the sample has just these."""
    torch.manual_seed(0)
    sample = torch.randn(400, 8)
    sample = sample - sample.mean(0)
    white = sample @ torch.linalg.inv(torch.linalg.cholesky(sample.T.cov()).T)
    assert features.frechet_distance(white, white) == pytest.approx(0, abs=1e-5)
    assert features.frechet_distance(white, 3 * white + 0.5) == pytest.approx(8 * 0.25 + 8 * 4, rel=1e-3)


def test_too_few_clips_are_refused():
    with pytest.raises(ValueError, match="wants more samples than that on both sides; got 10 and 100"):
        features.frechet_distance(torch.randn(10, 64), torch.randn(100, 64))


def test_labels_are_what_the_clip_shows():
    captions, scene = shapes.sample(0, range(200))
    wanted = features.labels(captions, scene)
    for i, caption in enumerate(captions):
        assert shapes.SHAPES[wanted["shape"][i]] == caption.shape
        assert caption.camera in (None, shapes.CAMERAS[wanted["camera"][i]])
        assert bool(wanted["second"][i]) == (caption.second is not None)
    assert wanted["motion"].max() < 12


def test_it_trains_and_its_weights_load(tmp_path):
    few = ["--set", "fit.steps=3", "--set", "fit.batch=4"]
    command = [sys.executable, "-m", "distill", "features", str(tmp_path / "run"), *few]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    model = features.load(tmp_path / "run" / "model.safetensors")
    assert model(torch.zeros(2, 3, 17, 64, 64)).shape == (2, 64)
    accuracy = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert set(accuracy) == {"shape", "colour", "motion", "camera", "second"}


def test_the_bundled_classifier_tells_sets_of_clips_apart():
    """Drawn clips are near drawn clips; frozen ones are far from them."""
    folder = ROOT / "models" / "shapes-features"
    model = features.load(folder / "model.safetensors")
    drawn = [shapes.clips(0, shapes.SPLITS["dev"][first : first + 96]).video_BCTHW for first in (0, 96)]
    frozen = drawn[1][:, :, :1].expand_as(drawn[1])
    with torch.no_grad():
        a, b, still = (torch.cat([model(part) for part in v.split(16)]) for v in (*drawn, frozen))
    assert features.frechet_distance(a, still) > 2 * features.frechet_distance(a, b)
    assert json.loads((folder / "accuracy.json").read_text())["motion"] > 0.7
