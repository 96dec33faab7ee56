"""Every metric: (nearly) its ideal on drawn clips, at most a half on what it is there to catch."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from distill import evaluate, metrics
from distill.data import shapes
from distill.data.shapes import Caption

IDEAL = {name: 1.0 for name in (*metrics.SCORED, "score", "i2v_fidelity", "dynamic_degree")}


def as_30_db(video):
    """An autoencoder of 30 dB."""
    generator = torch.Generator().manual_seed(0)
    return video + 10 ** (-30 / 20) * 2 * torch.randn(video.shape, generator=generator)


def value(name: str, video, truth) -> float:
    return metrics.measure(video, truth, as_30_db).values[name].nanmean().item()


@pytest.fixture(scope="module")
def true_values():
    clips, closed = evaluate.draw_clips("dev", 48)
    assert closed.sum() == 24
    return metrics.measure(clips.video_BCTHW, clips, as_30_db).values


@pytest.mark.parametrize("name", IDEAL)
def test_drawn_clips_score_their_ideal(true_values, name):
    assert true_values[name].nanmean().item() == pytest.approx(IDEAL[name], abs=0.02)


def test_drawn_clips_have_no_errors(true_values):
    assert true_values["trajectory_error_px"].nanmean() < 0.3
    assert true_values["flicker"].mean() < 0.5
    assert true_values["psnr_db"].isnan().sum() == 24  # open captions have no one true clip


# --- counter-examples -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moving() -> shapes.Clips:
    """Six clips of a square that moves right while the camera pans."""
    indices = list(shapes.SPLITS["dev"][:6])
    caption = Caption("red", "square", "moves right", "slowly", "camera pans left")
    captions, scene = shapes.sample(0, indices, caption)
    return shapes.Clips(shapes.render(scene), captions, scene, (0, tuple(indices)))


def redrawn(truth: shapes.Clips, **changes) -> torch.Tensor:
    return shapes.render(replace(truth.scene, **changes))


def test_the_clips_below_are_good_to_begin_with(moving):
    values = metrics.measure(moving.video_BCTHW, moving, as_30_db).values
    assert values["score"].min() > 0.97


def test_another_caption_is_not_followed(moving):
    scene = moving.scene
    other = redrawn(moving, travel_B2=scene.travel_B2.flip(1) * 2.2, pan_B=-scene.pan_B)
    assert value("prompt_following", other, moving) <= 0.1
    # One part of three wrong costs that part alone.
    only_camera = redrawn(moving, pan_B=-scene.pan_B)
    assert value("prompt_following", only_camera, moving) == pytest.approx(2 / 3, abs=0.05)


def test_other_futures_keep_the_captions_that_the_clips_were_given(moving):
    """These clips' captions were chosen, not drawn; closed, they leave one future only."""
    for future in metrics.truth_futures(moving, 3):
        assert torch.equal(future.travel_B2, moving.scene.travel_B2) and torch.equal(future.pan_B, moving.scene.pan_B)


def test_a_frozen_clip_has_no_motion(moving):
    assert value("motion_amount", moving.video_BCTHW[:, :, :1].expand_as(moving.video_BCTHW), moving) <= 0.1


def test_twice_as_fast_is_too_much_motion(moving):
    faster = redrawn(moving, travel_B2=2 * moving.scene.travel_B2, pan_B=2 * moving.scene.pan_B)
    assert value("motion_amount", faster, moving) <= 0.3
    assert value("dynamic_degree", faster, moving) == pytest.approx(2, abs=0.05)


def test_a_shape_that_turns_into_another_is_not_consistent(moving):
    other = redrawn(moving, shape_B=torch.full_like(moving.scene.shape_B, shapes.SHAPES.index("star")))
    other_colour = redrawn(moving, colour_B3=moving.scene.colour_B3.flip(1))
    for swapped in (other, other_colour):
        video = moving.video_BCTHW.clone()
        video[:, :, 3:] = swapped[:, :, 3:]
        assert value("subject_consistency", video, moving) <= 0.75
        video[:, :, 1:] = swapped[:, :, 1:]
        if swapped is other_colour:
            assert value("subject_consistency", video, moving) <= 0.5


def test_a_shape_that_vanishes_is_not_consistent(moving):
    gone = redrawn(moving, radius_B=torch.full_like(moving.scene.radius_B, -9.0))
    video = torch.cat([moving.video_BCTHW[:, :, :3], gone[:, :, 3:]], 2)
    assert value("subject_consistency", video, moving) <= 0.5


def test_colours_that_drift_are_not_a_consistent_background(moving):
    drift = torch.linspace(0, 1, 17)[:, None, None] * torch.tensor([0.7, -0.5, 0.4])[:, None, None, None]
    assert value("background_consistency", (moving.video_BCTHW + drift).clamp(-1, 1), moving) <= 0.5


def test_shuffled_frames_are_not_smooth(moving):
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    assert value("motion_smoothness", moving.video_BCTHW[:, :, order], moving) <= 0.5


def test_blur_and_noise_are_bad_images(moving):
    blurred = F.avg_pool3d(F.pad(moving.video_BCTHW, (3, 3, 3, 3, 0, 0), mode="replicate"), (1, 7, 7), stride=1)
    assert value("imaging_quality", blurred, moving) <= 0.5
    noisy = moving.video_BCTHW + 0.2 * torch.randn_like(moving.video_BCTHW)
    assert value("imaging_quality", noisy, moving) <= 0.5
    assert value("validity", noisy, moving) == 0


def test_the_average_of_two_clips_is_not_valid(moving):
    """What too few steps make of an open choice: squared error would reward it."""
    scene = moving.scene
    other = redrawn(moving, travel_B2=-0.6 * scene.travel_B2.flip(1), pan_B=-scene.pan_B)
    ghost = (moving.video_BCTHW + other) / 2
    assert value("validity", ghost, moving) == 0
    assert value("score", ghost, moving) <= 0.7


def test_another_first_frame_is_not_faithful(moving):
    video = moving.video_BCTHW.clone()
    video[:, :, 0] = moving.video_BCTHW[torch.arange(6).roll(1), :, 0]
    assert value("i2v_fidelity", video, moving) <= 0.5


def test_one_future_again_and_again_is_not_diverse():
    indices = list(shapes.SPLITS["dev"][:12])
    captions, _ = shapes.sample(0, indices, Caption("red", "square", "drifts"))
    futures = [metrics.choices_of(captions, shapes.sample(0, indices, captions[0], future=f)[1]) for f in range(1, 33)]
    by_pair = [list(samples) for samples in zip(*futures, strict=True)]
    drawn, made = [pair[:16] for pair in by_pair], [pair[16:] for pair in by_pair]
    assert metrics.diversity(made, drawn).mean() >= 0.95
    assert metrics.diversity([[pair[0]] * 16 for pair in made], drawn).max() == 0
    two = [[pair[0], pair[1]] * 8 for pair in made]
    assert metrics.diversity(two, drawn).mean() <= 0.5
    closed = [[("turns+", "3", "static camera", "none")] * 16]
    assert metrics.diversity(closed, closed).isnan().all()  # nothing was left open
