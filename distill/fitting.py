"""Fit the world to a video: which clip of `shapes` explains it best, and where is everything in each frame?

The first frame is known (it was given to the model), so everything it shows is known: kinds, colours, start,
background. What a video adds is fitted, in four steps of which each starts where the one before ended:

1. the camera, on the background, by a grid and then by gradient;
2. the shape in every frame alone (position, size, turn), from where its colour is and a grid of turning speeds;
3. the laws of motion (still, travels, wanders, bounces, turns, grows), each by least squares on these tracks;
4. the two laws that fit best, and the second shape, by gradient on the pixels of the whole clip. The better one wins.

Nothing of the caption's motion goes in: a video that does something else is found to do something else. Only whether a
second shape may be there is taken from the caption.

Shape suffixes: B clip, C channel, T frame, H row, W column, K candidate. Frame units: the frame is 2 wide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distill import losses
from distill.data import shapes
from distill.data.shapes import NUM_FRAMES, SIZE, Scene, Track

LAWS = ("is still", "travels", "wanders", "bounces", "turns", "grows")
"""The ways to move that can be told apart in a video; `turns` and `grows` go either way."""

COARSE = 32
CHUNK = 16
_SYMMETRY = {"square": 4, "triangle": 3, "star": 5}


@dataclass(frozen=True)
class Fit:
    """What was found in B videos."""

    scene: Scene
    """The clip of the world that explains each video best."""
    law: list[str]
    """One of ``LAWS`` each."""
    camera: list[str]
    """One of ``shapes.CAMERAS`` each: the nearest to the fitted pan and zoom."""
    tracked: Track
    """The shape in each frame by itself, whatever law it follows; camera and second shape as fitted."""
    visible_BT: Tensor
    """Share of the shape that is to be seen, by its colour, in [0, 1]."""
    explained_psnr_db_B: Tensor
    """PSNR of the video against ``scene`` drawn."""

    @property
    def pace_B(self) -> Tensor:
        """k of the fitted law; 0 where it has none (is still, wanders)."""
        return paces(self.scene, self.law)

    @property
    def direction_B(self) -> Tensor:
        """Angle of the travel, radians, clockwise from the right."""
        return torch.atan2(self.scene.travel_B2[:, 1], self.scene.travel_B2[:, 0])


def fit(video_BCTHW: Tensor, given: Scene) -> Fit:
    """Find the best clip of the world for each video.

    Args:
        video_BCTHW: 17 frames of 64 x 64 pixels in [-1, 1].
        given: what the first frames show. Its motion is not read, and of a second shape only whether there is one.

    Raises:
        ValueError: videos of another size, or another number of them than scenes.
    """
    wanted = (len(given), 3, NUM_FRAMES, SIZE, SIZE)
    if tuple(video_BCTHW.shape) != wanted:
        raise ValueError(f"fit wants videos of shape {wanted}, one for each scene; got {tuple(video_BCTHW.shape)}")
    parts = range(0, len(given), CHUNK)
    found = [_fit(video_BCTHW[i : i + CHUNK].float(), given[i : i + CHUNK]) for i in parts]
    return Fit(
        scene=_joined([part.scene for part in found]),
        law=[law for part in found for law in part.law],
        camera=[camera for part in found for camera in part.camera],
        tracked=_joined([part.tracked for part in found]),
        visible_BT=torch.cat([part.visible_BT for part in found]),
        explained_psnr_db_B=torch.cat([part.explained_psnr_db_B for part in found]),
    )


def _joined(parts: list[Any]) -> Any:
    return type(parts[0])(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(parts[0])})


def _fit(video_BCTHW: Tensor, given: Scene) -> Fit:
    coarse_BCTHW = _shrink(video_BCTHW)
    start = still(given)
    start = _fit_camera(coarse_BCTHW, start)
    seen = segment(video_BCTHW, start)
    tracked, visible_BT = _track(coarse_BCTHW, start, seen)
    start = _place_second(video_BCTHW, start, given.second_shape_B, seen)
    tracked = replace(tracked, second_centre_BT2=shapes.track(start).second_centre_BT2)
    scenes, laws_BK = _laws(start, tracked, visible_BT)
    fitted = [_refine(coarse_BCTHW, scene, COARSE, 30) for scene in scenes]
    chosen, scene = _choose(coarse_BCTHW, fitted, laws_BK)
    scene = _refine(video_BCTHW, scene, SIZE, 20, gently=True)
    with torch.no_grad():
        explained_psnr_db_B = losses.clip_psnr_db(shapes.render(scene), video_BCTHW)
    moved = shapes.track(scene)
    tracked = replace(tracked, pan_BT=moved.pan_BT, zoom_BT=moved.zoom_BT, second_centre_BT2=moved.second_centre_BT2)
    return Fit(scene, chosen, cameras(scene), tracked, visible_BT, explained_psnr_db_B)


def paces(scene: Scene, law: Sequence[str]) -> Tensor:
    """The pace k with which each scene follows its law; 0 for a law that has none (is still, wanders)."""
    by_law = {
        "travels": scene.travel_B2.norm(dim=1),
        "bounces": scene.bounce_rate_B - 1,
        "turns": scene.spin_B.abs() / 2.4,
        "grows": torch.where(scene.growth_B > 0, scene.growth_B / 1.1, scene.growth_B / -0.65),
    }
    zero = torch.zeros(())
    return torch.stack([by_law[name][i] if name in by_law else zero for i, name in enumerate(law)])


def still(given: Scene) -> Scene:
    """The same first frame with nothing moving and nothing coming in."""
    zeros = {
        name: torch.zeros_like(getattr(given, name))
        for name in ("growth_B", "spin_B", "travel_B2", "bounce_B", "path_B32", "onset_B", "pan_B", "zoom_B")
    }
    return replace(given.alone, **zeros, bounce_rate_B=torch.full_like(given.radius_B, 1.5))


def _shrink(video_BCTHW: Tensor) -> Tensor:
    return F.avg_pool3d(video_BCTHW, (1, SIZE // COARSE, SIZE // COARSE))


def _minimise(
    start: dict[str, Tensor], rates: dict[str, float], steps: int, loss: Callable[[dict[str, Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Adam with a cosine schedule. ``loss`` returns a value per clip: clips do not meet, so their sum is minimised."""
    values = {name: value.clone().requires_grad_() for name, value in start.items()}
    groups = [{"params": [value], "lr": rates[name]} for name, value in values.items()]
    optimiser = torch.optim.Adam(groups, betas=(0.8, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            loss(values).sum().backward()
            optimiser.step()
            schedule.step()
    return {name: value.detach() for name, value in values.items()}


# --- 1. the camera --------------------------------------------------------------------------------------------------

_GRID = [(pan, 0.0) for pan in (-0.8, -0.65, -0.5, -0.35, -0.2, 0.0, 0.2, 0.35, 0.5, 0.65, 0.8)]
_GRID += [(0.0, zoom) for zoom in (-0.9, -0.75, -0.6, -0.4, -0.2, 0.2, 0.4, 0.6, 0.75, 0.9)]


def _fit_camera(coarse_BCTHW: Tensor, start: Scene) -> Scene:
    """Pan and zoom that lay the known background over the video, whatever moves before it."""
    frames = torch.tensor([2, 4, 6, 8, 10, 12, 14, 16])
    t_BT = (frames / (NUM_FRAMES - 1)).expand(len(start), -1)
    target_BCTHW = coarse_BCTHW[:, :, frames]
    # What looks like the shape says nothing about the background.
    distance_BTHW = (target_BCTHW / 2 + 0.5 - start.colour_B3[:, :, None, None, None]).norm(dim=1)
    weight_BTHW = (distance_BTHW > 0.2).float()

    def error(pan_B: Tensor, zoom_B: Tensor, every: int = 1) -> Tensor:
        moved = shapes.track(replace(start, pan_B=pan_B, zoom_B=zoom_B), t_BT[:, ::every])
        wrong_BCTHW = shapes.draw_background(start, moved, COARSE) - target_BCTHW[:, :, ::every]
        squared_BTHW = wrong_BCTHW.square().mean(1)
        # Saturating (Geman-McClure): a second shape must not drag the camera along.
        return (weight_BTHW[:, ::every] * squared_BTHW / (squared_BTHW + 0.02)).mean(dim=(1, 2, 3))

    with torch.no_grad():
        ones = torch.ones(len(start))
        errors_KB = torch.stack([error(pan * ones, zoom * ones, every=3) for pan, zoom in _GRID])
        best_B2 = torch.tensor(_GRID)[errors_KB.argmin(0)]
    values = {"pan_B": best_B2[:, 0], "zoom_B": best_B2[:, 1]}
    values = _minimise(values, {"pan_B": 0.03, "zoom_B": 0.03}, 25, lambda v: error(v["pan_B"], v["zoom_B"]))
    return replace(start, **values)


def cameras(scene: Scene) -> list[str]:
    """The camera that each scene's pan and zoom are nearest to, one of ``shapes.CAMERAS``."""
    ideal_K2 = torch.tensor([(0.0, 0.0), (-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0)])  # in CAMERAS' order
    at_B2 = torch.stack([scene.pan_B / 0.5, scene.zoom_B / 0.6], 1)
    return [shapes.CAMERAS[k] for k in torch.cdist(at_B2, ideal_K2).argmin(1).tolist()]


# --- 2. the shape in every frame ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segments:
    """To whom the pixels belong, by colour alone."""

    shape_BTHW: Tensor
    """Share of the shape in each pixel, in [0, 1]."""
    other_BTHW: Tensor
    """1 where the colour is neither the background's, nor the shape's, nor a mixture of the two."""


@torch.no_grad()
def segment(video_BCTHW: Tensor, scene: Scene, moved: Track | None = None) -> Segments:
    """Split the pixels into background (known once the camera is), shape and other things.

    Where the shape is known (``moved``), so is the light on it.
    """
    image = video_BCTHW / 2 + 0.5
    behind = shapes.draw_background(scene, moved or shapes.track(scene)) / 2 + 0.5
    front = scene.colour_B3[:, :, None, None, None].expand_as(behind)
    if moved is not None:
        huge = replace(moved, radius_BT=torch.full_like(moved.radius_BT, 99.0))
        filled = replace(scene.alone, shape_B=torch.zeros_like(scene.shape_B))
        front = shapes.draw(filled, huge) / 2 + 0.5
    away = front - behind
    share_BTHW = (((image - behind) * away).sum(1) / away.square().sum(1).clamp(min=1e-4)).clamp(0, 1)
    off_BTHW = (image - behind - share_BTHW[:, None] * away).norm(dim=1)
    other_BTHW = (off_BTHW > 0.22).float()
    return Segments(share_BTHW * (1 - other_BTHW), other_BTHW)


def _centroids(mass_BTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Area in pixels ``[B, T]`` and centre on the screen ``[B, T, 2]``."""
    pixel_N = (torch.arange(SIZE) + 0.5) * (2 / SIZE) - 1
    area_BT = mass_BTHW.sum(dim=(2, 3))
    x_BT = (mass_BTHW.sum(2) * pixel_N).sum(-1) / area_BT.clamp(min=1e-6)
    y_BT = (mass_BTHW.sum(3) * pixel_N).sum(-1) / area_BT.clamp(min=1e-6)
    return area_BT, torch.stack([x_BT, y_BT], -1)


def _track(coarse_BCTHW: Tensor, start: Scene, seen: Segments) -> tuple[Track, Tensor]:
    moved = shapes.track(start)
    # Faint traces all over the picture are no shape.
    area_BT, screen_BT2 = _centroids((seen.shape_BTHW - 0.25).clamp(min=0) / 0.75)
    zoom_BT = moved.zoom_BT
    centre_BT2 = screen_BT2 * zoom_BT[..., None] + torch.stack([moved.pan_BT, torch.zeros_like(moved.pan_BT)], -1)
    ratio_BT = (area_BT * zoom_BT.square() / area_BT[:, :1].clamp(min=1)).sqrt().clamp(0.2, 3)
    centre_BT2, ratio_BT = centre_BT2.clone(), ratio_BT.clone()
    centre_BT2[:, 0], ratio_BT[:, 0] = start.position_B2, 1
    for t in range(1, NUM_FRAMES):  # where it cannot be seen, or only in part, it stays as it was
        lost_B = area_BT[:, t] < 6
        centre_BT2[lost_B, t] = centre_BT2[lost_B, t - 1]
        partly_B = lost_B | (screen_BT2[:, t].abs().amax(1) > 0.7)
        ratio_BT[partly_B, t] = ratio_BT[partly_B, t - 1]
    moved = replace(moved, centre_BT2=centre_BT2, radius_BT=start.radius_B[:, None] * ratio_BT)

    weight_BTHW = 1 - F.max_pool2d(seen.other_BTHW, SIZE // COARSE)

    def error_BT(candidate: Track) -> Tensor:
        wrong_BTHW = (shapes.draw(start, candidate, COARSE) - coarse_BCTHW).square().mean(1)
        return (wrong_BTHW * weight_BTHW).mean(dim=(2, 3))

    with torch.no_grad():
        t_T = torch.linspace(0, 1, NUM_FRAMES)
        speeds_K = torch.linspace(-3.0, 3.0, 13)
        turned = [start.angle_B[:, None] + speed * t_T for speed in speeds_K]
        errors_KB = torch.stack([error_BT(replace(moved, angle_BT=angle_BT)).mean(1) for angle_BT in turned])
        # Standing unless turning is clearly better: round shapes, and those that cannot be seen.
        errors_KB[len(speeds_K) // 2] *= 0.98
        angle_BT = torch.stack(turned)[errors_KB.argmin(0), torch.arange(len(start))]

    values = {"centre": moved.centre_BT2, "radius": moved.radius_BT.log(), "angle": angle_BT}

    def track_of(v: dict[str, Tensor]) -> Track:
        return replace(moved, centre_BT2=v["centre"], radius_BT=v["radius"].exp(), angle_BT=v["angle"])

    rates = {"centre": 0.03, "radius": 0.03, "angle": 0.06}
    values = _minimise(values, rates, 30, lambda v: error_BT(track_of(v)))
    tracked = track_of(values)
    with torch.no_grad():
        covered_BTHW = coverage(start, tracked)
        full_BT = covered_BTHW[:, :1].sum(dim=(2, 3)) * (tracked.radius_BT / start.radius_B[:, None]).square()
        full_BT = full_BT / zoom_BT.square()
        visible_BT = ((covered_BTHW * seen.shape_BTHW).sum(dim=(2, 3)) / full_BT.clamp(min=1)).clamp(0, 1)
    return tracked, visible_BT


@torch.no_grad()
def coverage(scene: Scene, moved: Track) -> Tensor:
    """``[B, T, H, W]``: share of each pixel that the (first) shape covers, as if nothing were before it."""
    black = replace(scene.alone, background_B23=torch.zeros_like(scene.background_B23))
    white = replace(black, colour_B3=torch.full_like(scene.colour_B3, 2.0))  # lit or not, clamped to 1
    return shapes.draw(white, moved)[:, 0] / 2 + 0.5


# --- 3. the laws of motion ------------------------------------------------------------------------------------------


def _laws(start: Scene, tracked: Track, visible_BT: Tensor) -> tuple[list[Scene], list[list[str]]]:
    """The two laws that explain the tracks best, as scenes to start from, best first, and their names."""
    costs, scenes = [], []
    for law in LAWS:
        cost_B, scene = _least_squares(law, start, tracked, visible_BT)
        costs.append(cost_B)
        scenes.append(scene)
    order_KB = torch.stack(costs).argsort(0)[:2].tolist()
    picked = [_joined([scenes[k][b : b + 1] for b, k in enumerate(order_B)]) for order_B in order_KB]
    return picked, [[LAWS[k] for k in order_B] for order_B in order_KB]


def _least_squares(law: str, start: Scene, tracked: Track, visible_BT: Tensor) -> tuple[Tensor, Scene]:
    """Misfit of one law (its parameters counted against it) and the scene with the parameters that fit the tracks."""
    t_T = torch.linspace(0, 1, NUM_FRAMES)
    weight_BT = visible_BT.clone()
    weight_BT[:, 0] = 0  # known
    offset_BT2 = tracked.centre_BT2 - start.position_B2[:, None]
    growth_BT = tracked.radius_BT / start.radius_B[:, None] - 1
    turn_BT = tracked.angle_BT - start.angle_B[:, None]
    fold_B = torch.tensor([_SYMMETRY.get(shapes.SHAPES[k], 0) for k in start.shape_B.tolist()])
    best_cost_B = torch.full((len(start),), math.inf)
    best: dict[str, Tensor] = {}
    count = {"is still": 0, "travels": 2, "wanders": 6, "bounces": 2, "turns": 1, "grows": 1}[law]

    def slope(values_BT: Tensor, basis_T: Tensor) -> Tensor:
        return (weight_BT * values_BT * basis_T).sum(1) / (weight_BT * basis_T**2).sum(1).clamp(min=1e-6)

    def options() -> Any:
        if law == "bounces":
            for rate in torch.arange(1.1, 2.7, 0.1).tolist():
                wave_T = torch.sin(math.pi * rate * t_T).abs()
                height_B = slope(-offset_BT2[..., 1], wave_T).clamp(0.15, 1.2)
                yield {"bounce_B": height_B, "bounce_rate_B": torch.full_like(height_B, rate)}, 0
            return
        # Only what an open caption can leave to chance starts late: growing a little later is growing a little slower.
        for onset in torch.arange(0, 0.45, 0.05).tolist() if law in ("travels", "wanders", "turns") else [0.0]:
            s_T = ((t_T - onset) / (1 - onset)).clamp(min=0)
            found: dict[str, Tensor] = {"onset_B": torch.full((len(start),), onset)}
            if law == "travels":
                found["travel_B2"] = torch.stack([slope(offset_BT2[..., 0], s_T), slope(offset_BT2[..., 1], s_T)], 1)
            elif law == "turns":
                found["spin_B"] = slope(turn_BT, s_T)
            elif law == "grows":
                found["growth_B"] = slope(growth_BT, s_T).clamp(min=-0.95)
            elif law == "wanders":
                basis_TP = shapes.wander_basis(s_T)
                normal_BPP = torch.einsum("bt,tp,tq->bpq", weight_BT, basis_TP, basis_TP) + 1e-3 * torch.eye(3)
                right_BP2 = torch.einsum("bt,tp,btd->bpd", weight_BT, basis_TP, offset_BT2)
                found["path_B32"] = torch.linalg.solve(normal_BPP, right_BP2)
            yield found, int(onset > 0)

    for found, extra in options():
        moved = shapes.track(replace(start, **found))
        wrong_BT = (moved.centre_BT2 - tracked.centre_BT2).square().sum(-1) / 0.03**2
        wrong_BT = wrong_BT + (moved.radius_BT / tracked.radius_BT.clamp(min=1e-3) - 1).square() / 0.06**2
        # A turn by a whole symmetry cannot be seen; round shapes (fold 0) do not turn at all.
        apart_BT = (
            torch.sin((moved.angle_BT - tracked.angle_BT) * fold_B[:, None] / 2) * 2 / fold_B.clamp(min=1)[:, None]
        )
        wrong_BT = wrong_BT + apart_BT.square() / 0.12**2
        cost_B = (weight_BT * wrong_BT.clamp(max=25)).sum(1) + 3 * (count + extra)
        better_B = cost_B < best_cost_B
        for name, value in found.items():
            before = best.get(name, getattr(start, name))
            best[name] = torch.where(better_B.view(-1, *[1] * (value.dim() - 1)), value, before)
        best_cost_B = torch.where(better_B, cost_B, best_cost_B)
    return best_cost_B, replace(start, **best)


# --- 4. pixels ------------------------------------------------------------------------------------------------------


def _place_second(video_BCTHW: Tensor, start: Scene, kind_B: Tensor, seen: Segments) -> Scene:
    """Where a second shape would have to start, and in what colour, from the pixels that are nobody's."""
    moved = shapes.track(start)
    area_BT, screen_BT2 = _centroids(seen.other_BTHW)
    seen_BT = (area_BT > 20).float()
    there_B = (kind_B >= 0) & (seen_BT.sum(1) >= 2)
    if not there_B.any():
        return start
    world_BT2 = screen_BT2 * moved.zoom_BT[..., None]
    world_BT2[..., 0] += moved.pan_BT
    mass_B = area_BT.sum(1).clamp(min=1)
    colour_B3 = torch.einsum("bcthw,bthw->bc", video_BCTHW / 2 + 0.5, seen.other_BTHW) / mass_B[:, None]
    radius_B = torch.full_like(start.radius_B, 0.42)
    first_B = seen_BT.argmax(1)
    entry_B2 = screen_BT2[torch.arange(len(start)), first_B]
    # It comes in over the side that it was first seen at, straight towards the other one.
    across = (entry_B2[:, 1].abs() > entry_B2[:, 0].abs()).long()
    rows = torch.arange(len(start))
    side_B = -entry_B2[rows, across].sign()
    t_T = torch.linspace(0, 1, NUM_FRAMES)
    # Seen in part, its centre of mass is not its centre: the speed is taken where most of it can be seen.
    whole_BT = seen_BT * (area_BT > 0.5 * area_BT.amax(1, keepdim=True))
    along_BT = world_BT2[rows, :, across]
    mean_t_B = (whole_BT * t_T).sum(1) / whole_BT.sum(1).clamp(min=1)
    mean_along_B = (whole_BT * along_BT).sum(1) / whole_BT.sum(1).clamp(min=1)
    spread_B = (whole_BT * (t_T - mean_t_B[:, None]) ** 2).sum(1)
    together_B = (whole_BT * (t_T - mean_t_B[:, None]) * (along_BT - mean_along_B[:, None])).sum(1)
    slope_B = together_B / spread_B.clamp(min=1e-3)
    speed_B = torch.where(spread_B > 0.01, slope_B * side_B, torch.full_like(slope_B, 1.4)).clamp(0.8, 2.4) * side_B
    lane_B = (whole_BT * world_BT2[rows, :, 1 - across]).sum(1) / whole_BT.sum(1).clamp(min=1)
    position_B2 = torch.zeros_like(start.position_B2)
    position_B2[rows, across] = mean_along_B - speed_B * mean_t_B
    position_B2[rows, 1 - across] = lane_B
    travel_B2 = torch.zeros_like(position_B2)
    travel_B2[rows, across] = speed_B
    return replace(
        start,
        second_shape_B=torch.where(there_B, kind_B, -1),
        second_colour_B3=colour_B3,
        second_radius_B=radius_B,
        second_angle_B=torch.zeros_like(radius_B),
        second_position_B2=position_B2,
        second_travel_B2=travel_B2,
    )


_RATES = {
    "travel_B2": 0.02, "path_B32": 0.02, "spin_B": 0.04, "growth_B": 0.02, "bounce_B": 0.02, "bounce_rate_B": 0.02,
    "onset_B": 0.01, "pan_B": 0.005, "zoom_B": 0.005, "second_colour_B3": 0.02, "second_radius_B": 0.01,
    "second_angle_B": 0.04, "second_position_B2": 0.03, "second_travel_B2": 0.04,
}  # fmt: skip
_OF_LAW = ("travel_B2", "path_B32", "spin_B", "growth_B", "bounce_B", "onset_B")


def _refine(video_BCTHW: Tensor, scene: Scene, size: int, steps: int, gently: bool = False) -> Scene:
    """Gradient on the pixels; a law's parameters that are zero are not that law's, and stay zero."""
    names = [n for n in _RATES if scene.second_shape_B.max() >= 0 or not n.startswith("second")]
    used = {name: (getattr(scene, name) != 0).float() for name in _OF_LAW}

    def scene_of(v: dict[str, Tensor]) -> Scene:
        values = {name: value * used[name] if name in used else value for name, value in v.items()}
        return replace(scene, **{**values, "onset_B": values["onset_B"].clamp(0, 0.6)})

    def loss(v: dict[str, Tensor]) -> Tensor:
        changed = scene_of(v)
        return (shapes.draw(changed, shapes.track(changed), size) - video_BCTHW).square().mean(dim=(1, 2, 3, 4))

    rates = {name: _RATES[name] * (0.5 if gently else 1) for name in names}
    return scene_of(_minimise({name: getattr(scene, name) for name in names}, rates, steps, loss))


def _choose(video_BCTHW: Tensor, scenes: list[Scene], laws: list[list[str]]) -> tuple[list[str], Scene]:
    """The candidate with the smaller error; a free path has to be better by half."""
    with torch.no_grad():
        errors_KB = torch.stack(
            [(shapes.render(s, size=COARSE) - video_BCTHW).square().mean(dim=(1, 2, 3, 4)) for s in scenes]
        )
    handicap = {"wanders": 1.5, "is still": 0.95}
    handicap_KB = torch.tensor([[handicap.get(law, 1.0) for law in row] for row in laws])
    best_B = ((errors_KB + 1e-4) * handicap_KB).argmin(0).tolist()
    law = [laws[k][b] for b, k in enumerate(best_B)]
    return law, _joined([scenes[k][b : b + 1] for b, k in enumerate(best_B)])
