"""Fitting the world to drawn clips finds what they were drawn with."""

import math
from dataclasses import replace

import pytest
import torch

from distill import fitting, metrics
from distill.data import shapes


@pytest.fixture(scope="module")
def drawn() -> shapes.Clips:
    return shapes.clips(0, shapes.SPLITS["dev"][:48])


@pytest.fixture(scope="module")
def fitted(drawn) -> fitting.Fit:
    return fitting.fit(drawn.video_BCTHW, drawn.scene)


def test_law_and_camera_are_found(drawn, fitted):
    law = [metrics.LAW_OF[caption.motion] for caption in drawn.captions]
    assert sum(a == b for a, b in zip(law, fitted.law, strict=True)) >= 47
    assert fitted.camera == fitting.cameras(drawn.scene)


def test_direction_within_5_degrees_and_pace_within_5_percent(drawn, fitted):
    """Of clips that can be seen to move: some leave the screen at once, or behind the second shape."""
    law = [metrics.LAW_OF[caption.motion] for caption in drawn.captions]
    true_pace_B, seen_B = fitting.paces(drawn.scene, law), (fitted.visible_BT > 0.3).sum(1) >= 6
    true_direction_B = torch.atan2(drawn.scene.travel_B2[:, 1], drawn.scene.travel_B2[:, 0])
    apart = torch.remainder(fitted.direction_B - true_direction_B + math.pi, 2 * math.pi) - math.pi
    judged = [i for i, name in enumerate(law) if seen_B[i] and fitted.law[i] == name]
    directions = torch.tensor([apart[i].abs().item() for i in judged if law[i] == "travels"]).rad2deg()
    paces = torch.tensor([(fitted.pace_B[i] / true_pace_B[i] - 1).abs().item() for i in judged if true_pace_B[i] > 0])
    assert len(directions) >= 10
    assert len(paces) >= 30
    assert directions.quantile(0.97) <= 5
    assert paces.quantile(0.97) <= 0.05


def test_the_best_clip_of_the_world_is_the_clip(fitted):
    assert fitted.explained_psnr_db_B.quantile(0.05) >= 38


def test_a_second_shape_is_found_only_where_there_is_one(drawn, fitted):
    scene = replace(drawn.scene, second_shape_B=torch.full_like(drawn.scene.second_shape_B, 2))
    alone = drawn.scene.second_shape_B < 0
    clips = drawn.video_BCTHW[alone][:6]
    lured = fitting.fit(clips, scene[alone][:6])
    assert not metrics.second_seen(clips, lured.scene).any()
    there = metrics.second_seen(drawn.video_BCTHW, fitted.scene)
    # One that has hardly come in by the end shows too few pixels to be sure of.
    shown = (metrics.second_coverage(drawn.scene, shapes.track(drawn.scene)) > 0.5).sum(dim=(1, 2, 3)) > 300
    assert there[shown].all()
    assert not there[alone].any()


def test_a_video_of_another_size_is_refused(drawn):
    with pytest.raises(ValueError, match=r"fit wants videos of shape \(2, 3, 17, 64, 64\).* got \(2, 3, 9, 64, 64\)"):
        fitting.fit(drawn.video_BCTHW[:2, :, :9], drawn.scene[:2])
