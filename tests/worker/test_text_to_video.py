"""`VideoPipeline` of a model that takes no image: from a sentence alone, and from a video; progress and stopping, also
where a stock pipeline has no callback."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from PIL import Image

from distill.schedule import started_at
from tests.footage import moving_square
from tests.students import make_t2v_student
from worker.contract import Phase
from worker.engine.base import Observed
from worker.pipeline import Options, VideoPipeline, _telling
from worker.settings import MODELS_DIR, Settings

PROMPT = "a red circle moves right quickly, static camera"
VIDEO = np.stack([moving_square(i / 8, 64) for i in range(17)])


def load(folder, engines) -> VideoPipeline:
    return VideoPipeline(folder, Options.of(Settings(device="cpu", torch_threads=1, engine="eager", engines=engines)))


@pytest.fixture(scope="module")
def pipeline(engines, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t2v") / "shapes-t2v"
    make_t2v_student(folder)
    return load(folder, engines)


@pytest.fixture(scope="module")
def animating(engines):
    return load(MODELS_DIR / "shapes-4step", engines)


class Stop(Exception):
    pass


def shares_of(pipeline, **start) -> list[float]:
    """What is reported of the denoising."""
    seen: list[tuple[Phase, float]] = []
    pipeline.denoise(None, PROMPT, seed=1, on_progress=lambda *said: seen.append(said), **start)
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    return [share for phase, share in seen if phase is Phase.DENOISING]


@pytest.mark.parametrize(("strength", "first"), [(None, 0), (1, 0), (0.9, 1), (0.7, 3)])
def test_the_model_is_asked_for_its_own_noise_levels_from_the_first_step_on(pipeline, monkeypatch, strength, first):
    timesteps: list[float] = []
    engine = Observed(pipeline.choice.engine, lambda inputs: timesteps.append(inputs["timestep"].item()))
    monkeypatch.setattr(pipeline, "_engines", {"transformer": engine})
    start = {} if strength is None else {"video_THWC": VIDEO, "strength": strength}
    denoised = pipeline.denoise(None, PROMPT, seed=1, **start)
    assert timesteps == pytest.approx([1000 * sigma for sigma in pipeline.card.sigmas[first:]], abs=1e-3)
    assert denoised.first_step == (None if strength is None else first)


def test_the_noise_over_a_video_is_that_of_the_step(pipeline, monkeypatch):
    """What the transformer is given first is (1 - sigma) x_0 + sigma noise."""
    given: list[torch.Tensor] = []
    engine = Observed(pipeline.choice.engine, lambda inputs: given.append(inputs["hidden_states"]))
    monkeypatch.setattr(pipeline, "_engines", {"transformer": engine})
    pipeline.denoise(None, PROMPT, seed=1)
    noise_BCTHW = given[0]
    given.clear()
    pipeline.denoise(None, PROMPT, seed=1, video_THWC=VIDEO, strength=0.625)
    video_BCTHW = torch.from_numpy(VIDEO).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        x0_BCTHW = pipeline._backbone.encode_video(pipeline._pipe.vae, video_BCTHW)
    torch.testing.assert_close(given[0], 0.375 * x0_BCTHW + 0.625 * noise_BCTHW)


def test_a_video_of_which_nothing_is_left_makes_no_difference(pipeline):
    other = pipeline(None, PROMPT, seed=2, video_THWC=VIDEO, strength=1).frames_THWC
    assert np.array_equal(pipeline(None, PROMPT, seed=2).frames_THWC, other)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_each_step_is_reported_once_however_often_the_model_is_called(pipeline, monkeypatch, guidance_scale):
    monkeypatch.setitem(pipeline.card.call, "guidance_scale", guidance_scale)
    pipeline.free_memory()  # what the sentences were encoded to without guidance
    assert len(shares_of(pipeline)) == 1 + 4
    assert len(shares_of(pipeline, video_THWC=VIDEO, strength=0.9)) == 1 + 3
    pipeline.free_memory()


def test_it_stops_at_the_next_step_and_is_usable_afterwards(pipeline):
    calls = 0

    def stop_at_the_third(phase: Phase, _share: float) -> None:
        nonlocal calls
        calls += phase is Phase.DENOISING
        if calls == 3:
            raise Stop

    before = pipeline(None, PROMPT, seed=5).frames_THWC
    with pytest.raises(Stop):
        pipeline(None, PROMPT, seed=5, on_progress=stop_at_the_third)
    assert np.array_equal(pipeline(None, PROMPT, seed=5).frames_THWC, before)


def test_warming_up_takes_what_the_model_takes(pipeline):
    assert pipeline.warm_up().frames_THWC.shape == (17, 64, 64, 3)
    assert pipeline.model_card.sigmas == pipeline.card.sigmas


IMAGE = Image.new("RGB", (64, 64))


@pytest.mark.parametrize(
    ("image", "start", "says"),
    [
        (IMAGE, {}, r"the input is image; shapes-t2v \(task t2v\) takes none or video"),
        (
            None,
            {"video_THWC": VIDEO[:5], "strength": 0.5},
            r"the video is \(5, 64, 64, 3\); this model takes 17 frames",
        ),
        (None, {"video_THWC": VIDEO}, "strength is None; wanted a number"),
        (None, {"video_THWC": VIDEO, "strength": 0.0}, "strength is 0.0; wanted a number above 0"),
        (None, {"video_THWC": VIDEO, "strength": 1.5}, "strength is 1.5; wanted a number above 0 and up to 1"),
        (None, {"strength": 0.5}, "strength is 0.5; wanted a number above 0 and up to 1 with a video, else none"),
    ],
)
def test_what_does_not_go_together_is_refused(pipeline, image, start, says):
    with pytest.raises(ValueError, match=says):
        pipeline.denoise(image, PROMPT, seed=1, **start)


def test_a_model_that_animates_images_wants_one(animating):
    with pytest.raises(ValueError, match=r"the input is none; shapes-4step \(task ti2v\) takes image"):
        animating.denoise(None, PROMPT, seed=1)
    assert animating.model_card.sigmas == ()


# --- a stock pipeline without a callback ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hunyuan() -> HunyuanVideo15Pipeline:
    """Guided: it calls its transformer twice for each step, and takes no `callback_on_step_end`."""
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        task_type="t2v",
    ).eval()
    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(32,) * 5, layers_per_block=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("first", [0, 3])
def test_its_steps_are_told_and_it_can_be_stopped_between_them(hunyuan, first):
    words = {name: torch.ones(1, 5, 8) for name in ("prompt_embeds", "prompt_embeds_2")}
    words |= {name: torch.ones(1, 5) for name in ("prompt_embeds_mask", "prompt_embeds_mask_2")}
    words |= {f"negative_{name}": -value for name, value in words.items()}
    scheduler, calls = hunyuan.scheduler, []
    hook = hunyuan.transformer.register_forward_pre_hook(lambda *_: calls.append(1))

    def run(told) -> None:
        hunyuan.scheduler = _telling(started_at(scheduler, first), told)
        with torch.no_grad():
            hunyuan(**words, height=32, width=32, num_frames=5, num_inference_steps=4, output_type="latent")

    def stop(_done: int, _made: torch.Tensor) -> None:
        raise Stop

    done: list[int] = []
    run(lambda number, _made: done.append(number))
    assert done == list(range(1, 5 - first))
    assert len(calls) == 2 * len(done)
    calls.clear()
    with pytest.raises(Stop):
        run(stop)
    assert len(calls) == 2
    hook.remove()
    hunyuan.scheduler = scheduler
