"""The reference form of the metrics: what a video looks like beside the teacher's of the same image, prompt and seed.

It knows no world, so it works for any model and any size of video. `looks` takes figures from one model's videos,
`beside` compares two models' clip by clip; `distill.gate` holds limits against what comes out. The figures are coarse:
they tell a broken model from a working one, not a good one from a better one, which is what `distill.metrics` is for.

Shape suffixes: B clip, C channel, T frame, H row, W column, N pair of frames, P pixel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.metrics import ssim

FLOORS = {
    "motion": 0.05,
    "flicker": 0.5,
    "sharpness": 1e-3,
    "detail": 1e-4,
    "warp_error": 0.2,
    "saturation": 0.01,
}
"""Figures that are compared as ratios, and below what they count as nothing: of two still clips none moves more."""

DIFFERENCES = ("first_frame_ssim", "colour_drift", "dead_frames")
"""Figures that are compared by their difference."""

BROKEN = 4.0
"""A clip whose ratio of one of the figures `TELLING` is so large, or one over it, is nothing like the teacher's."""
TELLING = ("motion", "flicker", "sharpness", "saturation")

FLOW_SIZE = 64
CELLS = 8
DEAD_CONTRAST = 0.15
_WINDOW = 7
_ITERATIONS = 3
_COLOURS_OF = 4096


@dataclass(frozen=True)
class Looks:
    """What was taken from B videos."""

    figures: dict[str, Tensor]
    """``[B]`` each; see `looks`."""
    flow_BF: Tensor
    """All optical flow of each video, in one row."""


@torch.no_grad()
def looks(video_BCTHW: Tensor, given_BCHW: Tensor | None) -> Looks:
    """The figures of B videos. A video that holds a NaN is all dead frames, and its other figures are NaN.

    Args:
        video_BCTHW: RGB in [-1, 1], three frames or more.
        given_BCHW: the images that they were made from, in [-1, 1]; None where they were made from text alone.

    Returns:
        motion: mean optical flow from frame to frame, percent of the frame's shorter side.
        flicker: mean second difference over time of the colours of 8 x 8 cells, in levels of 255.
        first_frame_ssim: structural similarity of the first frame and the given image; 1 where there is none.
        colour_drift: mean distance of a frame's colours from the first frame's, whatever their place, in [0, 1].
        sharpness: mean squared difference of neighbouring pixels after the first frame.
        detail: mean squared Laplacian after the first frame. Edges go into it more than into the sharpness.
        warp_error: mean difference from the next frame moved back by the flow, in levels of 255: what changes without
            moving.
        saturation: mean distance of the largest channel from the smallest after the first frame, in [0, 1].
        dead_frames: share of the frames after the first that are black or of one colour.
    """
    sound_B = video_BCTHW.flatten(1).isfinite().all(1)
    video = video_BCTHW.float().nan_to_num().clamp(-1, 1)
    flow_BT2HW = flow(video)
    figures = {
        "motion": 100 * flow_BT2HW.norm(dim=2).mean(dim=(1, 2, 3)) / min(flow_BT2HW.shape[-2:]),
        "flicker": flicker(video),
        "first_frame_ssim": ssim(video[:, :, 0], video[:, :, 0] if given_BCHW is None else given_BCHW.float()),
        "colour_drift": colour_drift(video),
        "sharpness": sharpness(video),
        "detail": detail(video),
        "warp_error": warp_error(video, flow_BT2HW),
        "saturation": (video.amax(1) - video.amin(1))[:, 1:].mean(dim=(1, 2, 3)) / 2,
        "dead_frames": dead_frames(video),
    }
    unsound = dict.fromkeys(figures, torch.nan) | {"dead_frames": 1.0}
    figures = {name: torch.where(sound_B, value_B, unsound[name]) for name, value_B in figures.items()}
    return Looks(figures, flow_BT2HW.flatten(1))


def beside(made: Looks, teachers: Looks) -> dict[str, Tensor]:
    """Two models' `looks`, clip by clip, ``[B]`` each: logarithms of ratios (`FLOORS`), differences (`DIFFERENCES`).

    And `other_motion`: 1 - cosine of the angle between all flow of the two, 0 where everything moves the same way, 1
    where nothing has to do with the teacher's. And `broken_clips`: 1 for a clip with a ratio beyond ``BROKEN``, or half
    of whose frames are dead, else 0.
    """
    ours, theirs = made.figures, teachers.figures
    ratios = {name: _log_ratio(ours[name], theirs[name], floor) for name, floor in FLOORS.items()}
    apart = {name: ours[name] - theirs[name] for name in DIFFERENCES}
    alike_B = F.cosine_similarity(made.flow_BF, teachers.flow_BF, dim=1)
    both_still_B = torch.maximum(ours["motion"], theirs["motion"]) <= FLOORS["motion"]
    furthest_B = torch.stack([ratios[name] for name in TELLING]).nan_to_num().abs().amax(0)
    broken_B = (furthest_B > math.log(BROKEN)) | (apart["dead_frames"] > 0.5)
    other_motion_B = torch.where(both_still_B, 0.0, 1 - alike_B)
    return {**ratios, **apart, "other_motion": other_motion_B, "broken_clips": broken_B.float()}


def _log_ratio(value_B: Tensor, other_B: Tensor, floor: float) -> Tensor:
    return (value_B.clamp(min=floor) / other_B.clamp(min=floor)).log()


# --- motion ---------------------------------------------------------------------------------------------------------


def flow(video_BCTHW: Tensor) -> Tensor:
    """Optical flow from each frame to the next, ``[B, T-1, 2, H, W]``, pixels of frames made smaller to FLOW_SIZE."""
    grey_BTHW = _grey(shrink(video_BCTHW, FLOW_SIZE))
    flow_N2HW = optical_flow(grey_BTHW[:, :-1].flatten(0, 1), grey_BTHW[:, 1:].flatten(0, 1))
    return flow_N2HW.unflatten(0, (len(grey_BTHW), -1))


def optical_flow(before_NHW: Tensor, after_NHW: Tensor) -> Tensor:
    """Where each pixel goes, ``[N, 2, H, W]``, pixels to the right and down: pyramidal Lucas-Kanade (Bouguet 2001).

    Dense: in a window around each pixel the least-squares solution of I_x u + I_y v + I_t = 0, three times at each
    level with ``after`` warped by what is known, from 8 pixels up to the whole picture. A little Tikhonov weight keeps
    flat places at rest. Right to a tenth, but for the edges, for textured pictures that move by up to an eighth
    of their side.
    """
    levels = [(before_NHW[:, None], after_NHW[:, None])]
    while min(levels[-1][0].shape[-2:]) >= 16:
        before, after = levels[-1]
        levels.append((F.avg_pool2d(before, 2), F.avg_pool2d(after, 2)))
    flow_N2HW = torch.zeros_like(levels[-1][0]).repeat(1, 2, 1, 1)
    for before, after in reversed(levels):
        size = before.shape[-2:]
        if flow_N2HW.shape[-2:] != size:
            flow_N2HW = 2 * F.interpolate(flow_N2HW, size, mode="bilinear", align_corners=False)
        for _ in range(_ITERATIONS):
            flow_N2HW = flow_N2HW + _step(before, _warped(after, flow_N2HW))
    return flow_N2HW


def _step(before_N1HW: Tensor, warped_N1HW: Tensor) -> Tensor:
    """One Lucas-Kanade step, at most a pixel either way."""
    x, y = _gradients((before_N1HW + warped_N1HW) / 2)
    late = warped_N1HW - before_N1HW
    products = torch.cat([x * x, x * y, y * y, x * late, y * late], 1)
    xx, xy, yy, xt, yt = F.avg_pool2d(products, _WINDOW, 1, _WINDOW // 2, count_include_pad=False).unbind(1)
    xx, yy = xx + 1e-4, yy + 1e-4
    determinant = xx * yy - xy * xy
    return (torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], 1) / determinant[:, None]).clamp(-1, 1)


def _gradients(image_N1HW: Tensor) -> tuple[Tensor, Tensor]:
    padded = F.pad(image_N1HW, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return across, down


def _warped(image_N1HW: Tensor, flow_N2HW: Tensor) -> Tensor:
    """The image read at each pixel's place plus its flow; beyond the edge the edge goes on."""
    height, width = image_N1HW.shape[-2:]
    y_HW, x_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x_NHW = (x_HW.to(flow_N2HW) + flow_N2HW[:, 0] + 0.5) * (2 / width) - 1
    y_NHW = (y_HW.to(flow_N2HW) + flow_N2HW[:, 1] + 0.5) * (2 / height) - 1
    grid_NHW2 = torch.stack([x_NHW, y_NHW], -1)
    return F.grid_sample(image_N1HW, grid_NHW2, mode="bilinear", padding_mode="border", align_corners=False)


def warp_error(video_BCTHW: Tensor, flow_BT2HW: Tensor) -> Tensor:
    """Mean difference of each frame from the next, moved back by the flow between them, in levels of 255, ``[B]``."""
    small_BTCHW = shrink(video_BCTHW, FLOW_SIZE).transpose(1, 2)
    back_NCHW = _warped(small_BTCHW[:, 1:].flatten(0, 1), flow_BT2HW.flatten(0, 1))
    apart_NCHW = (back_NCHW - small_BTCHW[:, :-1].flatten(0, 1)).abs()
    return apart_NCHW.unflatten(0, (len(video_BCTHW), -1)).mean(dim=(1, 2, 3, 4)) * 127.5


def flicker(video_BCTHW: Tensor) -> Tensor:
    """Mean second difference over time of the colours of 8 x 8 cells, in levels of 255, ``[B]``."""
    cells_BCTHW = F.adaptive_avg_pool3d(video_BCTHW, (video_BCTHW.shape[2], CELLS, CELLS))
    return cells_BCTHW.diff(n=2, dim=2).abs().mean(dim=(1, 2, 3, 4)) * 127.5


# --- looks ----------------------------------------------------------------------------------------------------------


def colour_drift(video_BCTHW: Tensor) -> Tensor:
    """Mean distance of the colours of each frame after the first from the first frame's, in [0, 1], ``[B]``.

    The earth mover's distance of the two histograms of each channel, which is the mean distance of their sorted values.
    """
    small_BCTP = shrink(video_BCTHW, int(_COLOURS_OF**0.5)).flatten(3)
    sorted_BCTP = small_BCTP.sort(dim=3).values / 2
    return (sorted_BCTP[:, :, 1:] - sorted_BCTP[:, :, :1]).abs().mean(dim=(1, 2, 3))


def sharpness(video_BCTHW: Tensor) -> Tensor:
    """Mean squared difference of neighbouring pixels after the first frame, ``[B]``: blur has less, noise more."""
    later = video_BCTHW[:, :, 1:]
    across_B, down_B = (later.diff(dim=axis).square().mean(dim=(1, 2, 3, 4)) for axis in (4, 3))
    return across_B + down_B


def detail(video_BCTHW: Tensor) -> Tensor:
    """Mean squared Laplacian after the first frame, ``[B]``."""
    later = video_BCTHW[:, :, 1:]
    around = later[..., :-2, 1:-1] + later[..., 2:, 1:-1] + later[..., 1:-1, :-2] + later[..., 1:-1, 2:]
    return (around - 4 * later[..., 1:-1, 1:-1]).square().mean(dim=(1, 2, 3, 4))


def dead_frames(video_BCTHW: Tensor) -> Tensor:
    """Share of the frames after the first without a picture, ``[B]``: less than 15 % of the first frame's contrast."""
    contrast_BT = video_BCTHW.std(dim=(3, 4)).mean(1)
    return (contrast_BT[:, 1:] < DEAD_CONTRAST * contrast_BT[:, :1]).float().mean(1)


def _grey(video_BCTHW: Tensor) -> Tensor:
    weights_C = torch.tensor([0.299, 0.587, 0.114]).to(video_BCTHW)
    return torch.einsum("c,bcthw->bthw", weights_C, video_BCTHW)


def shrink(video_BCTHW: Tensor, size: int) -> Tensor:
    """Frames made smaller, by averaging, until their shorter side is ``size``; smaller ones stay as they are."""
    num_frames, height, width = video_BCTHW.shape[2:]
    scale = size / min(height, width)
    if scale >= 1:
        return video_BCTHW
    return F.adaptive_avg_pool3d(video_BCTHW, (num_frames, round(height * scale), round(width * scale)))
