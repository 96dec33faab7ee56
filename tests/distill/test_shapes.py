"""The world `shapes`: its formulas (design.md section 4) against a slow reference, and its laws of chance."""

import math

import pytest
import torch

from distill.data import shapes
from distill.data.shapes import Caption


def reference_pixel(scene: shapes.Scene, i: int, t: float, x: float, y: float) -> list[float]:
    """One pixel, by the formulas of the design as they are written there, with the scalars of ``math``."""
    zoom = scene.zoom_B[i].item()
    z = 1 / (1 - zoom * t) if zoom < 0 else 1 + zoom * t
    world_x, world_y = x * z + scene.pan_B[i].item() * t, y * z
    f, a, b, c = scene.wave_B4[i].tolist()
    bend = 0.7 * math.sin(2.3 * (world_x * math.cos(c) + world_y * math.sin(c)))
    w = 0.5 + 0.5 * math.sin(f * (world_x * math.cos(a) + world_y * math.sin(a)) + b + bend)
    c0, c1 = scene.background_B23[i].tolist()
    f, d, e, g = scene.texture_B4[i].tolist()
    ripple = math.sin(f * (world_x * math.cos(d) + world_y * math.sin(d)) + e)
    across = math.sin(f * (world_y * math.cos(d) - world_x * math.sin(d)) + g)
    shade = 1 - 0.45 * (0.5 + 0.25 * ripple + 0.25 * across)
    rgb = [(p * (1 - w) + q * w) * shade for p, q in zip(c0, c1, strict=True)]
    onset = scene.onset_B[i].item()
    t = max(0, (t - onset) / (1 - onset))

    rise = scene.bounce_B[i].item() * abs(math.sin(math.pi * scene.bounce_rate_B[i].item() * t))
    px = scene.position_B2[i, 0].item() + scene.travel_B2[i, 0].item() * t
    py = scene.position_B2[i, 1].item() + scene.travel_B2[i, 1].item() * t - rise
    radius = scene.radius_B[i].item() * (1 + scene.growth_B[i].item() * t)
    angle = scene.angle_B[i].item() + scene.spin_B[i].item() * t
    dx, dy = world_x - px, world_y - py
    u = math.cos(-angle) * dx - math.sin(-angle) * dy
    v = math.sin(-angle) * dx + math.cos(-angle) * dy
    p = math.hypot(u, v)
    distance = {
        "circle": lambda: p - radius,
        "ring": lambda: abs(p - 0.8 * radius) - 0.25 * radius,
        "square": lambda: max(abs(u), abs(v)) - 0.85 * radius,
        "triangle": lambda: max(v, 0.866 * u - 0.5 * v, -0.866 * u - 0.5 * v) - 0.6 * radius,
        "star": lambda: p - radius * (0.72 + 0.3 * math.cos(5 * math.atan2(v, u))),
    }[shapes.SHAPES[scene.shape_B[i]]]()
    coverage = 1 / (1 + math.exp(min(57.6 * distance, 80)))
    light = 1 - 0.25 * max(-1, min(1, dy))
    lit = [min(1, colour * light) for colour in scene.colour_B3[i].tolist()]
    return [2 * (back + (front - back) * coverage) - 1 for back, front in zip(rgb, lit, strict=True)]


@pytest.mark.parametrize("motion", shapes.CLOSED_MOTIONS)
@pytest.mark.parametrize("camera", ["camera pans right", "camera zooms in", "camera zooms out"])
def test_pixels_follow_the_formulas(motion, camera):
    kinds = [s for s in shapes.SHAPES if not (motion in shapes.SPINNING and s in shapes.ROUND_SHAPES)]
    for kind in kinds:
        _, scene = shapes.sample(3, [11, 12], Caption("green", kind, motion, "quickly", camera))
        video = shapes.render(scene)
        draws = torch.Generator().manual_seed(0)
        for _ in range(40):
            i, frame, row, column = (int(torch.randint(n, (1,), generator=draws)) for n in (2, 17, 64, 64))
            x, y = (column + 0.5) / 32 - 1, (row + 0.5) / 32 - 1
            wanted = reference_pixel(scene, i, frame / 16, x, y)
            assert video[i, :, frame, row, column].tolist() == pytest.approx(wanted, abs=2e-4)


def test_a_clip_depends_on_seed_and_index_alone():
    together = shapes.clips(5, range(40, 60))
    alone = shapes.clips(5, [47])
    assert torch.equal(together.video_BCTHW[7], alone.video_BCTHW[0])
    assert together.captions[7] == alone.captions[0]
    assert not torch.equal(shapes.clips(6, [47]).video_BCTHW, alone.video_BCTHW)


def test_half_of_the_captions_are_closed_and_all_of_them_parse():
    captions, _ = shapes.sample(0, range(4000))
    assert 0.46 < sum(c.closed for c in captions) / len(captions) < 0.54
    assert {c.motion for c in captions} == {*shapes.CLOSED_MOTIONS, *shapes.OPEN_MOTIONS}
    assert {c.camera for c in captions} == {*shapes.CAMERAS, None}
    for caption in captions:
        assert Caption.parse(str(caption)) == caption


def test_scenes_keep_to_their_ranges():
    captions, scene = shapes.sample(1, range(3000))
    for i, caption in enumerate(captions):
        low, high = {"grows": (0.22, 0.30), "shrinks": (0.40, 0.52)}.get(caption.motion, (0.30, 0.44))
        assert low <= scene.radius_B[i] <= high
        k = scene.bounce_rate_B[i].item() - 1
        assert {"quickly": 1.0, "slowly": 0.45}.get(caption.pace, k) == pytest.approx(k, abs=1e-5)
        assert 0.349 <= k <= 1.101
        if caption.motion == "drifts":
            assert scene.travel_B2[i].norm().item() == pytest.approx(k, abs=1e-5)
    first, second = scene.background_B23.unbind(1)
    assert (first - second).norm(dim=1).min() >= 0.25
    assert (first - scene.colour_B3).norm(dim=1).min() >= 0.35
    assert (second - scene.colour_B3).norm(dim=1).min() >= 0.35


def test_a_second_shape_is_outside_at_first_and_seen_later():
    text = "a red circle moves left slowly, static camera, and a square enters"
    _, scene = shapes.sample(2, range(64), Caption.parse(text))
    video = shapes.render(scene)
    alone = shapes.render(shapes.sample(2, range(64), Caption.parse(text.removesuffix(", and a square enters")))[1])
    difference_BT = (video - alone).abs().amax(dim=(1, 3, 4))
    assert difference_BT[:, 0].max() < 0.2  # at most the soft edge of what is about to come in
    assert (difference_BT[:, 4:].amax(1) > 0.3).all()


def test_a_wandering_shape_meets_its_way_points():
    _, scene = shapes.sample(4, range(8), Caption("red", "circle", "wanders", "quickly", "static camera"))
    at = torch.tensor([0, 1 / 3, 2 / 3, 1])
    t = scene.onset_B[:, None] + at * (1 - scene.onset_B[:, None])
    path = shapes.track(scene, t).centre_BT2
    wanted = scene.position_B2[:, None] + torch.cat([torch.zeros(8, 1, 2), scene.path_B32], 1)
    assert torch.allclose(path, wanted, atol=1e-5)


def test_an_open_motion_starts_late_and_a_closed_one_at_once():
    _, closed = shapes.sample(0, range(50), Caption("red", "square", "moves left", "slowly"))
    assert (closed.onset_B == 0).all()
    _, drifting = shapes.sample(0, range(50), Caption("red", "square", "drifts"))
    assert drifting.onset_B.max() > 0.35
    centre = shapes.track(drifting).centre_BT2
    for i, onset in enumerate(drifting.onset_B.tolist()):
        standing = int(onset * 16)
        assert torch.allclose(centre[i, : standing + 1], drifting.position_B2[i].expand(standing + 1, 2), atol=1e-6)
        assert torch.allclose(centre[i, -1], drifting.position_B2[i] + drifting.travel_B2[i], atol=1e-6)


def test_another_future_has_the_same_caption_and_first_frame():
    captions, scene = shapes.sample(0, range(200))
    same, other = shapes.sample(0, range(200), future=3)
    assert same == captions
    before, after = shapes.render(scene), shapes.render(other)
    assert torch.allclose(before[:, :, 0], after[:, :, 0], atol=5e-3)  # the soft edge of what is about to come in
    moved = (before - after).abs().amax(dim=(1, 2, 3, 4)) > 0.05
    assert not moved[torch.tensor([caption.closed for caption in captions])].any()
    assert moved[torch.tensor([not caption.closed for caption in captions])].float().mean() > 0.9


def test_each_clip_can_be_given_its_own_caption():
    captions, scene = shapes.sample(0, range(8))
    same, again = shapes.sample(0, range(8), captions)
    assert same == captions and torch.equal(again.travel_B2, scene.travel_B2)
    with pytest.raises(ValueError, match="one for each of 8 clips; got 3"):
        shapes.sample(0, range(8), captions[:3])


def test_some_frames_alone_are_what_they_are_in_the_clip():
    _, scene = shapes.sample(0, range(12))
    whole = shapes.render(scene)
    frames = torch.randint(17, (12, 3), generator=torch.Generator().manual_seed(0))
    picked = whole.transpose(1, 2)[torch.arange(12)[:, None], frames].transpose(1, 2)
    assert torch.allclose(shapes.render(scene, frames), picked, atol=1e-5)


def test_a_small_picture_is_the_large_one_seen_from_afar():
    _, scene = shapes.sample(0, range(12))
    shrunk = torch.nn.functional.avg_pool3d(shapes.render(scene), (1, 2, 2))
    assert (shapes.render(scene, size=32) - shrunk).abs().mean() < 0.015  # of which edges are the most


def test_the_renderer_is_differentiable_in_its_parameters():
    _, scene = shapes.sample(0, range(5))
    names = ("position_B2", "travel_B2", "radius_B", "angle_B", "growth_B", "pan_B", "zoom_B", "colour_B3", "wave_B4")
    names += ("texture_B4",)
    for name in names:
        getattr(scene, name).requires_grad_()
    shapes.render(scene).square().mean().backward()
    for name in names:
        gradient = getattr(scene, name).grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert gradient.abs().sum() > 0


def test_videos_are_in_range():
    video = shapes.clips(0, range(64)).video_BCTHW
    assert video.shape == (64, 3, 17, 64, 64)
    assert video.min() >= -1
    assert video.max() <= 1
