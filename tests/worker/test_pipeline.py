"""`VideoPipeline` with the bundled model: phases, progress, stopping, and the same bytes for the same seed."""

import numpy as np
import pytest
from PIL import Image

from distill.data import shapes
from worker.contract import Phase
from worker.pipeline import Options, VideoPipeline
from worker.settings import MODELS_DIR, Settings
from worker.video import encode_mp4


@pytest.fixture(scope="module")
def pipeline(engines):
    options = Options.of(Settings(device="cpu", torch_threads=1, engines=engines))
    return VideoPipeline(MODELS_DIR / "shapes-4step", options)


@pytest.fixture
def image(example_image):
    with Image.open(example_image) as opened:
        return opened.convert("RGB")


PROMPT = "a red circle moves right quickly, static camera"


def redness_centre(frame_HWC: np.ndarray) -> np.ndarray:
    """Mean column and row of what is redder than the rest."""
    redness = frame_HWC[..., 0].astype(float) - np.maximum(frame_HWC[..., 1], frame_HWC[..., 2])
    weight = np.clip(redness - np.quantile(redness, 0.9) * 0.6, 0, None) ** 2
    rows, columns = np.mgrid[:64, :64]
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def test_the_circle_of_the_readme_moves_right(pipeline, image):
    """The main job. It is asked to travel half of the picture, 32 pixels; half of that is wanted here."""
    frames = pipeline(image, PROMPT, seed=1).frames_THWC
    assert redness_centre(frames[-1])[0] - redness_centre(frames[0])[0] > 16


@pytest.mark.parametrize("motion", shapes.MOVES)
def test_a_circle_goes_where_the_sentence_says(pipeline, motion):
    caption = shapes.Caption("red", "circle", motion, "quickly", "static camera")
    _, scene = shapes.sample(0, [shapes.SPLITS["test"][77]], caption)
    first_HWC = ((shapes.render(scene)[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy()
    frames = pipeline(Image.fromarray(first_HWC), str(caption), seed=1).frames_THWC
    moved = redness_centre(frames[-1]) - redness_centre(frames[0])
    assert moved @ shapes.MOVES[motion] > 10


def test_the_first_frame_is_the_given_image(pipeline, image):
    first = pipeline(image, PROMPT, seed=1).frames_THWC[0].astype(float)
    error = np.square((first - np.asarray(image)) / 255).mean()
    assert -10 * np.log10(error) > 22


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(pipeline, image):
    videos = [encode_mp4(pipeline(image, PROMPT, seed=seed).frames_THWC, 8) for seed in (3, 3, 4)]
    assert videos[0] == videos[1]
    assert videos[0] != videos[2]


def test_phases_come_in_order_and_progress_only_grows(pipeline, image):
    seen: list[tuple[Phase, float]] = []
    result = pipeline(image, PROMPT, seed=1, on_progress=lambda phase, share: seen.append((phase, share)))
    phases = [phase for phase, _ in seen]
    steps = pipeline.card.call["num_inference_steps"]
    # The end of the denoising is the beginning of the decoding; then each piece, here there is one.
    assert phases == [Phase.ENCODING] + [Phase.DENOISING] * (steps + 1) + [Phase.DECODING] * 2
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    assert set(result.timings_s) == {Phase.ENCODING, Phase.DENOISING, Phase.DECODING}
    assert all(seconds > 0 for seconds in result.timings_s.values())


def test_it_stops_at_the_next_step_and_is_usable_afterwards(pipeline, image):
    class Stop(Exception):
        pass

    calls = 0

    def stop_at_the_third(phase: Phase, _share: float) -> None:
        nonlocal calls
        calls += phase is Phase.DENOISING
        if calls == 3:
            raise Stop

    before = pipeline(image, PROMPT, seed=5).frames_THWC
    with pytest.raises(Stop):
        pipeline(image, PROMPT, seed=5, on_progress=stop_at_the_third)
    assert calls == 3
    assert np.array_equal(pipeline(image, PROMPT, seed=5).frames_THWC, before)


def test_another_size_is_refused(pipeline):
    with pytest.raises(ValueError, match="the image is 32 x 64; this model takes 64 x 64"):
        pipeline(Image.new("RGB", (32, 64)), PROMPT, seed=0)
