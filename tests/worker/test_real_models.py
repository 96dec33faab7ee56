"""Every model that can be had, at tiny size, in a worker: its engines make what the stock pipeline makes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from distill.backbones import base
from distill.student import read_card
from tests import tiny
from worker.engine.errors import EngineError
from worker.pipeline import Options, VideoPipeline
from worker.settings import Settings

PROMPT = "a red circle grows"


@pytest.fixture(scope="module")
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def folder(real_models, variant):
    """The teacher: it is guided, so both halves of a call are there."""
    return real_models.teacher(variant)


@pytest.fixture(scope="module")
def image(variant, folder):
    if not tiny.takes_an_image(variant):
        return None
    size = read_card(folder).video
    levels = np.random.default_rng(0).integers(256, size=(size.height, size.width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


@pytest.fixture(scope="module")
def stock_THWC(folder, image):
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    given = {} if image is None else {"image": image}
    card = read_card(folder)
    call = base.load(card.backbone, card.task).arguments(card.call)
    made = pipe(prompt=PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **given, **call)
    return made.frames[0] * 255


def load(folder, engines, **settings):
    return VideoPipeline(folder, Options.of(Settings(device="cpu", torch_threads=1, engines=engines, **settings)))


OFTEN = ("i2v-14b", "t2v-a14b", "hunyuan-i2v", "hunyuan15-i2v")
"""One of each kind of graph."""
EACH = [
    pytest.param(variant, engine, marks=[] if engine == "ort" and variant in OFTEN else pytest.mark.slow)
    for variant in sorted(tiny.BACKBONES)
    for engine in ("ort", "eager")
]


@pytest.mark.parametrize(("variant", "engine"), EACH, indirect=["variant"])
def test_a_worker_makes_what_the_stock_pipeline_makes(variant, folder, image, stock_THWC, engine, engines):
    pipeline = load(folder, engines, engine=engine)
    assert pipeline.engine == f"{engine}-cpu"
    told = []
    made = pipeline(image, PROMPT, seed=0, on_progress=lambda _phase, share: told.append(share))
    assert made.frames_THWC.shape == stock_THWC.shape
    assert np.abs(made.frames_THWC - stock_THWC).max() <= 1.5
    assert told == sorted(told)
    assert np.abs(pipeline(image, PROMPT, seed=1).frames_THWC - stock_THWC).max() > 10  # or anything would do
    kinds = {name: made.name for name, made in pipeline._engines.items()}
    assert kinds == dict.fromkeys(["transformer", "transformer_2"][: tiny.networks(variant)], f"{engine}-cpu")


@pytest.mark.parametrize("variant", ["i2v-a14b", "t2v-a14b"], indirect=True)
def test_two_experts_take_one_clip_at_a_time_and_both_are_asked(folder, image, engines):
    with pytest.raises(EngineError, match="MAX_BATCH=2: the model is of two experts, set it to 1"):
        load(folder, engines, engine="eager", max_batch=2)
    pipeline = load(folder, engines, engine="eager")
    whole = pipeline(image, PROMPT, seed=0).frames_THWC.astype(float)
    swapped = copy.copy(pipeline)
    swapped._engines = dict(zip(pipeline._engines, reversed(pipeline._engines.values()), strict=True))
    assert np.abs(swapped(image, PROMPT, seed=0).frames_THWC - whole).max() > 10
