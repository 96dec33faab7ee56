"""What a video of the world `shapes` is worth, measured from its pixels (design.md section 5).

Most of it comes from fitting the world to the video (`distill.fitting`): what moved, which way and how far, what the
camera did, and which clip of the world would look most like it. Every metric is 1 (or its ideal) on drawn clips and at
most a half on what it is there to catch; tests/distill/test_metrics.py holds both for each.

Shape suffixes: B clip, T frame, H row, W column, N tracked point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from distill import fitting, losses
from distill.data import shapes
from distill.data.shapes import Caption, Clips, Scene, Track
from distill.fitting import Fit

SCORED = (
    "prompt_following",
    "motion_amount",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "imaging_quality",
    "validity",
)
"""``score`` is the mean of these, clip by clip."""

REPORTED = ("i2v_fidelity", "flicker", "trajectory_error_px", "psnr_db", "dynamic_degree", "explained_psnr_db")

LAW_OF = {
    **dict.fromkeys((*shapes.MOVES, "drifts"), "travels"),
    **dict.fromkeys(shapes.SPINNING, "turns"),
    **dict.fromkeys(("grows", "shrinks"), "grows"),
    "bounces": "bounces",
    "wanders": "wanders",
}
"""The law of motion (`fitting.LAWS`) that each motion of the captions follows."""

VALID_WITHIN_DB = 3.0
_SEEN = 0.3  # share of the shape that has to be visible for a frame to say something about it
_HALF = shapes.SIZE / 2  # pixels in a frame unit


@dataclass(frozen=True)
class Measured:
    """One value per clip and metric; NaN where a metric does not apply (a trajectory of an open caption)."""

    values: dict[str, Tensor]
    fit: Fit


@torch.no_grad()
def measure(video_BCTHW: Tensor, truth: Clips, reconstruct: Callable[[Tensor], Tensor]) -> Measured:
    """All metrics of B videos.

    Args:
        video_BCTHW: in [-1, 1], made from the first frames and captions of ``truth``.
        truth: the drawn clips. Of an open caption's clip only the first frame is truth; its future is one of many.
        reconstruct: encodes and decodes videos by the model's own autoencoder: what it can show at best.
    """
    video_BCTHW = video_BCTHW.float().clamp(-1, 1)
    fit = fitting.fit(video_BCTHW, truth.scene)
    fitted_BCTHW = shapes.render(fit.scene)
    dynamic_degree_B = _dynamic_degree(fit, truth)
    bound_B = losses.clip_psnr_db(reconstruct(fitted_BCTHW), fitted_BCTHW)
    closed_B = torch.tensor([caption.closed for caption in truth.captions])
    only_closed_B = torch.where(closed_B, 1.0, math.nan)
    labs = lab(video_BCTHW), lab(fitted_BCTHW)
    covers = fitting.coverage(fit.scene, fit.tracked), second_coverage(fit.scene, fit.tracked)
    values = {
        "prompt_following": prompt_following(video_BCTHW, truth.captions, fit),
        "motion_amount": (1 - (1 - dynamic_degree_B).abs()).clamp(min=0),
        "subject_consistency": _subject_consistency(video_BCTHW, *labs, *covers, fit),
        "background_consistency": _background_consistency(*labs, *covers),
        "motion_smoothness": _motion_smoothness(fit),
        "imaging_quality": _imaging_quality(video_BCTHW, fitted_BCTHW),
        "validity": (fit.explained_psnr_db_B >= bound_B - VALID_WITHIN_DB).float(),
        "i2v_fidelity": ssim(video_BCTHW[:, :, 0], truth.video_BCTHW[:, :, 0]),
        "flicker": (video_BCTHW - fitted_BCTHW).diff(dim=2).abs().mean(dim=(1, 2, 3, 4)) * 127.5,
        "trajectory_error_px": _trajectory_error_px(fit, truth.scene) * only_closed_B,
        "psnr_db": losses.psnr_db(video_BCTHW, truth.video_BCTHW).mean(1) * only_closed_B,
        "dynamic_degree": dynamic_degree_B,
        "explained_psnr_db": fit.explained_psnr_db_B,
    }
    # A clip that asks for no motion has no amount of it; its score is the mean of the others.
    values["score"] = torch.stack([values[name] for name in SCORED]).nanmean(0)
    return Measured(values, fit)


# --- the caption ----------------------------------------------------------------------------------------------------


def prompt_following(video_BCTHW: Tensor, captions: Sequence[Caption], fit: Fit) -> Tensor:
    """Of the parts that a caption fixes (motion, pace, camera, second shape) the share that the video has."""
    second_B = second_seen(video_BCTHW, fit.scene)
    pace_B = fit.pace_B
    shares = []
    for i, caption in enumerate(captions):
        agrees = [_motion_agrees(caption, fit, i)]
        if caption.pace and caption.motion != "wanders":  # the way-points of a wandering shape are random: no pace
            low, high = {"quickly": (0.67, 1.5), "slowly": (0.3, 0.67)}[caption.pace]
            agrees.append(low <= pace_B[i].item() <= high)
        if caption.camera:
            agrees.append(fit.camera[i] == caption.camera)
        if caption.second:
            agrees.append(bool(second_B[i]))
        shares.append(sum(agrees) / len(agrees))
    return torch.tensor(shares)


def _motion_agrees(caption: Caption, fit: Fit, i: int) -> bool:
    scene, pace = fit.scene, fit.pace_B[i].item()
    if fit.law[i] != LAW_OF[caption.motion]:
        return False
    if caption.motion in shapes.MOVES:
        x, y = shapes.MOVES[caption.motion]
        apart = torch.remainder(fit.direction_B[i] - math.atan2(y, x) + math.pi, 2 * math.pi) - math.pi
        return pace >= 0.15 and abs(apart.item()) <= math.radians(25)
    if caption.motion in shapes.SPINS:
        return scene.spin_B[i].item() * shapes.SPINS[caption.motion] >= 0.3
    if caption.motion in ("grows", "shrinks"):
        return scene.growth_B[i].item() * (1 if caption.motion == "grows" else -1) >= 0.07
    return pace >= 0.12 or caption.motion == "wanders"  # drifts, spins either way, bounces


def second_seen(video_BCTHW: Tensor, scene: Scene) -> Tensor:
    """Whether the fitted second shape is really there: with it the pixels that it covers are explained far better."""
    with_BTHW, without_BTHW = ((shapes.render(s) - video_BCTHW).square().mean(1) for s in (scene, scene.alone))
    covered_BTHW = second_coverage(scene, shapes.track(scene)) > 0.5
    unexplained_B = (with_BTHW * covered_BTHW).sum(dim=(1, 2, 3)) / (
        (without_BTHW * covered_BTHW).sum(dim=(1, 2, 3)).clamp(min=1e-6)
    )
    return (scene.second_shape_B >= 0) & (covered_BTHW.sum(dim=(1, 2, 3)) >= 100) & (unexplained_B < 0.35)


def second_coverage(scene: Scene, moved: Track) -> Tensor:
    """``[B, T, H, W]``: share of each pixel that the second shape covers; zero where there is none."""
    black = replace(
        scene, background_B23=torch.zeros_like(scene.background_B23), colour_B3=torch.zeros_like(scene.colour_B3)
    )
    white = replace(black, second_colour_B3=torch.full_like(scene.colour_B3, 2.0))  # lit or not, clamped to 1
    return shapes.draw(white, moved)[:, 0] / 2 + 0.5


# --- motion ---------------------------------------------------------------------------------------------------------


def _outline(moved: Track, scene: Scene) -> Tensor:
    """Eight points of the shape's rim on the screen, pixels, ``[B, T, N, 2]``; a round shape does not turn."""
    turns_B = torch.tensor([shapes.SHAPES[k] not in shapes.ROUND_SHAPES for k in scene.shape_B.tolist()]).float()
    angle_BT = scene.angle_B[:, None] + (moved.angle_BT - scene.angle_B[:, None]) * turns_B[:, None]
    around_BTN = angle_BT[..., None] + torch.arange(8) * (math.pi / 4)
    rim_BTN2 = moved.radius_BT[..., None, None] * torch.stack([around_BTN.cos(), around_BTN.sin()], -1)
    return _HALF * _on_screen(moved.centre_BT2[:, :, None] + rim_BTN2, moved)


def _ground(moved: Track) -> Tensor:
    """A grid of points of the background on the screen, pixels, ``[B, T, N, 2]``."""
    line_5 = torch.linspace(-0.8, 0.8, 5)
    points_N2 = torch.cartesian_prod(line_5, line_5)
    return _HALF * _on_screen(points_N2.expand(*moved.pan_BT.shape, -1, -1), moved)


def _on_screen(world_BTN2: Tensor, moved: Track) -> Tensor:
    x_BTN, y_BTN = world_BTN2.unbind(-1)
    return torch.stack([x_BTN - moved.pan_BT[..., None], y_BTN], -1) / moved.zoom_BT[..., None, None]


def _displacement(moved: Track, scene: Scene, visible_BT: Tensor) -> Tensor:
    """Mean distance from the first frame of the points of object and camera, pixels, ``[B]``."""
    rim_BT = (_outline(moved, scene) - _outline(moved, scene)[:, :1]).norm(dim=-1).mean(-1)
    ground_BT = (_ground(moved) - _ground(moved)[:, :1]).norm(dim=-1).mean(-1)
    seen_BT = (visible_BT > _SEEN).float()
    seen_BT[:, 0] = 0
    rim_B = (rim_BT * seen_BT).sum(1) / seen_BT.sum(1).clamp(min=1)
    return rim_B + ground_BT[:, 1:].mean(1)


def _dynamic_degree(fit: Fit, truth: Clips, num_futures: int = 24) -> Tensor:
    """Displacement found over displacement asked for, ``[B]``; NaN where less than a pixel is asked for.

    A closed caption asks for one amount. An open one allows a range, taken from many draws of what it leaves open;
    within it the ratio is 1, outside it is taken to the nearer end.
    """
    found_B = _displacement(fit.tracked, fit.scene, fit.visible_BT)
    allowed = []
    for scene in [truth.scene, *truth_futures(truth, num_futures)]:
        allowed.append(_displacement(shapes.track(scene), scene, fit.visible_BT))
    allowed_FB = torch.stack(allowed)
    asked_B = found_B.clamp(allowed_FB.amin(0), allowed_FB.amax(0))
    return torch.where(asked_B >= 1, found_B / asked_B, math.nan)


def truth_futures(truth: Clips, count: int) -> list[Scene]:
    """``count`` other ways in which the clips could have gone on, as scenes."""
    if truth.source is None:
        raise ValueError("these clips do not say which draws of the world they are: make them by shapes.clips")
    seed, indices = truth.source
    return [shapes.sample(seed, indices, truth.captions, future)[1] for future in range(1, count + 1)]


def _motion_smoothness(fit: Fit) -> Tensor:
    """1 - excess / 4 px: second differences of the rim's points beyond those of the fitted law of motion."""
    seen_BT = fit.visible_BT > _SEEN
    three_BT = (seen_BT[:, 2:] & seen_BT[:, 1:-1] & seen_BT[:, :-2]).float()

    def roughness_B(moved: Track) -> Tensor:
        bent_BT = _outline(moved, fit.scene).diff(n=2, dim=1).norm(dim=-1).mean(-1)
        return (bent_BT * three_BT).sum(1) / three_BT.sum(1).clamp(min=1)

    excess_B = roughness_B(fit.tracked) - roughness_B(shapes.track(fit.scene)) - 0.5
    return (1 - excess_B.clamp(min=0) / 4).clamp(min=0)


def _trajectory_error_px(fit: Fit, scene: Scene) -> Tensor:
    """Mean distance of the shape from where it should be, in the frames in which it should be on the screen."""
    wanted_BT2 = shapes.trajectory(scene)
    on_screen_BT = (wanted_BT2.abs().amax(-1) < 1).float()
    distance_BT = (fit.tracked.screen_BT2 - wanted_BT2).norm(dim=-1) * _HALF
    return (distance_BT * on_screen_BT).sum(1) / on_screen_BT.sum(1)


# --- looks ----------------------------------------------------------------------------------------------------------


def lab(video_BCTHW: Tensor) -> Tensor:
    """CIE L*a*b* (D65) of sRGB in [-1, 1]; distances there are differences that eyes see (2 is just noticeable)."""
    srgb = (video_BCTHW / 2 + 0.5).clamp(0, 1)
    linear = torch.where(srgb > 0.04045, ((srgb + 0.055) / 1.055) ** 2.4, srgb / 12.92)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    white = torch.tensor([0.9505, 1.0, 1.089])
    xyz = torch.einsum("xc,bcthw->bxthw", to_xyz / white[:, None], linear)
    f = torch.where(xyz > 0.008856, xyz.clamp(min=1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _subject_consistency(
    video_BCTHW: Tensor, lab_BCTHW: Tensor, fitted_lab_BCTHW: Tensor, covered_BTHW: Tensor, second_BTHW: Tensor,
    fit: Fit,
) -> Tensor:  # fmt: skip
    """Colour times outline of the shape, mean over the frames in which it should be seen.

    Colour: 1 up to a CIE distance of 3, 0 from 43 on. Outline: intersection over union with the fitted shape, 1 from
    .9 on (a tenth of a pixel, which is what tracking leaves open, costs a star that much).
    """
    clear_BTHW = 1 - second_BTHW
    expected_BTHW = covered_BTHW * clear_BTHW
    area_BT = expected_BTHW.sum(dim=(2, 3))
    inside_BTHW = (expected_BTHW > 0.9).float()
    distance_BT = (_mean_lab(lab_BCTHW, inside_BTHW) - _mean_lab(fitted_lab_BCTHW, inside_BTHW)).norm(dim=1)
    colour_BT = _fading(distance_BT, 3, 40)
    share_BTHW = fitting.segment(video_BCTHW, fit.scene, fit.tracked).shape_BTHW * clear_BTHW
    outline_BT = torch.minimum(share_BTHW, expected_BTHW).sum(dim=(2, 3)) / torch.maximum(
        share_BTHW * (covered_BTHW > 0.01), expected_BTHW
    ).sum(dim=(2, 3)).clamp(min=1)
    outline_BT = (outline_BT / 0.9).clamp(max=1)
    judged_BT = (area_BT > 12).float()
    judged_BT[:, 0] = 0
    mean_B = (colour_BT * outline_BT * judged_BT).sum(1) / judged_BT.sum(1).clamp(min=1)
    return torch.where(judged_BT.sum(1) > 0, mean_B, 1.0)


def ssim(image_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of pictures in [-1, 1], ``[B]``."""
    return torch.as_tensor(
        structural_similarity_index_measure(image_BCHW, other_BCHW, data_range=(-1.0, 1.0), reduction="none")
    )


def _mean_lab(lab_BCTHW: Tensor, weight_BTHW: Tensor) -> Tensor:
    total_BT = weight_BTHW.sum(dim=(2, 3)).clamp(min=1)
    return (lab_BCTHW * weight_BTHW[:, None]).sum(dim=(3, 4)) / total_BT[:, None]


def _background_consistency(
    lab_BCTHW: Tensor, fitted_lab_BCTHW: Tensor, covered_BTHW: Tensor, second_BTHW: Tensor
) -> Tensor:
    """Nearness of the free background to that of the fitted clip: 1 up to a CIE distance of 4, 0 from 29 on."""
    free_BTHW = (covered_BTHW + second_BTHW < 0.05).float()
    distance_BTHW = (lab_BCTHW - fitted_lab_BCTHW).norm(dim=1)
    mean_BT = (distance_BTHW * free_BTHW).sum(dim=(2, 3)) / free_BTHW.sum(dim=(2, 3)).clamp(min=1)
    return _fading(mean_BT[:, 1:], 4, 25).mean(1)


def _fading(distance: Tensor, free: float, over: float) -> Tensor:
    return (1 - (distance - free).clamp(min=0) / over).clamp(min=0)


def _imaging_quality(video_BCTHW: Tensor, fitted_BCTHW: Tensor) -> Tensor:
    """Gradient energy against the fitted clip's (blur has less, noise more), times nearness of the colours."""

    def energy_B(video: Tensor) -> Tensor:
        later = video[:, :, 1:]
        return later.diff(dim=3).square().mean(dim=(1, 2, 3, 4)) + later.diff(dim=4).square().mean(dim=(1, 2, 3, 4))

    ratio_B = (energy_B(video_BCTHW) + 1e-5) / (energy_B(fitted_BCTHW) + 1e-5)
    sharp_B = torch.minimum(ratio_B, 1 / ratio_B)
    mean_BC, std_BC = (
        (statistic(video_BCTHW) - statistic(fitted_BCTHW)).abs()
        for statistic in (lambda v: v.mean(dim=(2, 3, 4)), lambda v: v.std(dim=(2, 3, 4)))
    )
    return sharp_B * (1 - (mean_BC + std_BC).mean(1)).clamp(min=0)


# --- diversity ------------------------------------------------------------------------------------------------------


def choices(fit: Fit) -> list[tuple[str, ...]]:
    """What each clip chose of all that a caption can leave open, in bins: way, pace, camera, side of a second shape."""
    return _choices(fit.law, fit.camera, fit.scene, fit.pace_B)


def choices_of(captions: Sequence[Caption], scene: Scene) -> list[tuple[str, ...]]:
    """The same of drawn clips, from what they were drawn with."""
    law = [LAW_OF[caption.motion] for caption in captions]
    return _choices(law, fitting.cameras(scene), scene, fitting.paces(scene, law))


def _choices(law: Sequence[str], camera: Sequence[str], scene: Scene, pace_B: Tensor) -> list[tuple[str, ...]]:
    def octants(vector_B2: Tensor, parts: int = 8) -> list[int]:
        angle_B = torch.atan2(vector_B2[:, 1], vector_B2[:, 0])
        return torch.remainder((angle_B * parts / (2 * math.pi)).round(), parts).long().tolist()

    travel, path, entry = octants(scene.travel_B2), octants(scene.path_B32[:, 2]), octants(scene.second_travel_B2, 4)
    out: list[tuple[str, ...]] = []
    for i, name in enumerate(law):
        way = {
            "travels": str(travel[i]),
            "wanders": str(path[i]),
            "turns": "+" if scene.spin_B[i] > 0 else "-",
            "grows": "+" if scene.growth_B[i] > 0 else "-",
        }.get(name, "")
        pace = str(min(int(pace_B[i].item() / 0.25), 4))
        out.append((name + way, pace, camera[i], str(entry[i]) if scene.second_shape_B[i] >= 0 else "none"))
    return out


def diversity(made: list[list[tuple[str, ...]]], drawn: list[list[tuple[str, ...]]]) -> Tensor:
    """``[pairs]``: entropy of the choices of a model's samples over that of as many drawn clips, capped at 1.

    Args:
        made: for each (image, caption) pair the `choices` of its samples.
        drawn: the same of drawn clips; pairs that leave nothing open (entropy 0) have no diversity and are NaN.
    """
    ratios = []
    for ours, world in zip(made, drawn, strict=True):
        possible = _entropy(world)
        ratios.append(min(_entropy(ours) / possible, 1.0) if possible > 0 else math.nan)
    return torch.tensor(ratios)


def _entropy(samples: list[tuple[str, ...]]) -> float:
    """Sum of the entropies of each part's bins, nats: of independent choices that is the entropy of the whole."""
    total = 0.0
    for part in zip(*samples, strict=True):
        for count in Counter(part).values():
            total -= count / len(part) * math.log(count / len(part))
    return total
