"""The procedural world `shapes`: clips of one moving shape, drawn from a caption (design.md section 4).

64 x 64 pixels, 17 frames, 8 per second, RGB in [-1, 1]. Everything is drawn by signed distances in torch, batched, and
differentiable in the scene's real-valued parameters, so that a scene can be *fitted* to a video. A clip is a function
of ``(seed, index)`` alone: neither the batch it is drawn in nor the order of drawing changes it.

Shape suffixes: B clip, T frame, H row, W column, C channel. Frame coordinates x, y in [-1, 1], y down; t in [0, 1] over
the clip; k is the pace; angles in radians, clockwise on the screen (because y points down).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from distill.prompt import Exclusion, Grammar, Part

SIZE = 64
NUM_FRAMES = 17
FPS = 8

COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "green": (0.15, 0.75, 0.25),
    "blue": (0.20, 0.30, 0.95),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.60, 0.20, 0.80),
    "orange": (0.98, 0.55, 0.10),
    "white": (0.97, 0.97, 0.97),
    "cyan": (0.10, 0.80, 0.85),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
ROUND_SHAPES = ("circle", "ring")  # a turn of these cannot be seen
MOVES = {"moves left": (-1.0, 0.0), "moves right": (1.0, 0.0), "moves up": (0.0, -1.0), "moves down": (0.0, 1.0)}
SPINS = {"spins clockwise": 1.0, "spins counterclockwise": -1.0}
CLOSED_MOTIONS = (*MOVES, *SPINS, "grows", "shrinks", "bounces")
OPEN_MOTIONS = ("drifts", "spins", "wanders")
SPINNING = (*SPINS, "spins")
TEXTURE_DEPTH = 0.45
PACES = {"quickly": 1.0, "slowly": 0.45}
CAMERAS = ("static camera", "camera pans left", "camera pans right", "camera zooms in", "camera zooms out")

GRAMMAR = Grammar(
    parts=(
        Part(name="colour", prefix="a ", choices=tuple(COLOURS)),
        Part(name="shape", choices=SHAPES),
        Part(name="motion", choices=CLOSED_MOTIONS + OPEN_MOTIONS),
        Part(name="pace", choices=tuple(PACES), optional=True),
        Part(name="camera", prefix=", ", choices=CAMERAS, optional=True),
        Part(name="second", prefix=", and ", choices=tuple(f"a {s} enters" for s in SHAPES), optional=True),
    ),
    exclusions=(
        Exclusion(
            when={"shape": ROUND_SHAPES, "motion": SPINNING},
            reason="a circle or a ring looks the same however it is turned; spin a square, a triangle or a star",
        ),
    ),
    aliases={"an": "a"},
)

# Splits by index. Train has no upper end.
SPLITS = {"test": range(0, 10_000), "dev": range(10_000, 20_000), "train": range(20_000, 2**40)}


@dataclass(frozen=True)
class Caption:
    """One sentence of the grammar ``a {colour} {shape} {motion}[ {pace}][, {camera}][, and a {shape} enters]``."""

    colour: str
    shape: str
    motion: str
    pace: str | None = None
    camera: str | None = None
    second: str | None = None
    """The kind of a second shape that comes in, or None."""

    @classmethod
    def parse(cls, text: str) -> Caption:
        """Read a caption. Raises ``distill.prompt.PromptError`` that says what was expected where."""
        values = GRAMMAR.parse(text)
        second = values.pop("second", None)
        return cls(**values, second=second.split()[1] if second else None)

    def __str__(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.second:
            values["second"] = f"a {self.second} enters"
        return GRAMMAR.format(values)

    @property
    def closed(self) -> bool:
        """Whether the first frame and this sentence determine the clip."""
        return self.motion in CLOSED_MOTIONS and None not in (self.pace, self.camera) and self.second is None


@dataclass(frozen=True)
class Scene:
    """A batch of clips as the renderer's parameters. Real-valued fields may require gradients.

    All fields have the batch dimension B first; lengths are in frame units (the frame is 2 wide).
    """

    shape_B: Tensor
    """Index into ``SHAPES``, int64."""
    colour_B3: Tensor
    """sRGB in [0, 1]."""
    radius_B: Tensor
    position_B2: Tensor
    """Centre of the shape at t = 0, world coordinates."""
    angle_B: Tensor
    growth_B: Tensor
    """Radius at t is radius x (1 + growth t): 1.1 k for grows, -.65 k for shrinks."""
    spin_B: Tensor
    """Radians turned over the clip: +-2.4 k."""
    travel_B2: Tensor
    """Straight displacement over the clip."""
    bounce_B: Tensor
    """Height of the bounce, .5 or 0."""
    bounce_rate_B: Tensor
    """1 + k: half-waves of the bounce over the clip."""
    path_B32: Tensor
    """Offsets from the start at t = 1/3, 2/3, 1 of a wandering shape; zero for every other motion."""
    onset_B: Tensor
    """When the motion starts, in [0, .4] of the clip; it still ends with the clip. 0 for every closed motion."""
    pan_B: Tensor
    """Camera offset at t = 1: -.5 pans left, .5 pans right."""
    zoom_B: Tensor
    """-.6: zooms in, z = 1/(1 + .6 t); .6: zooms out, z = 1 + .6 t; 0: neither."""
    background_B23: Tensor
    """The two colours of the background, sRGB in [0, 1]."""
    wave_B4: Tensor
    """f, a, b, c of the background's wave."""
    texture_B4: Tensor
    """Frequency, direction and two phases of the background's fine texture."""
    second_shape_B: Tensor
    """Index into ``SHAPES``, or -1 for none."""
    second_colour_B3: Tensor
    second_radius_B: Tensor
    second_angle_B: Tensor
    second_position_B2: Tensor
    """Where it would be at t = 0 (outside the frame), world coordinates."""
    second_travel_B2: Tensor

    def __len__(self) -> int:
        return len(self.shape_B)

    def __getitem__(self, index: slice | Tensor) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def alone(self) -> Scene:
        """The same scenes without a second shape."""
        return replace(self, second_shape_B=torch.full_like(self.second_shape_B, -1))

    def to(self, device: torch.device | str) -> Scene:
        """The same scenes on another device."""
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass(frozen=True)
class Clips:
    """A batch of drawn clips with the sentences and scenes they were drawn from."""

    video_BCTHW: Tensor
    captions: list[Caption]
    scene: Scene
    source: tuple[int, tuple[int, ...]] | None = None
    """World seed and indices, where the clips are draws of the world."""


def clips(seed: int, indices: Sequence[int]) -> Clips:
    """Draw the clips ``indices`` of the world ``seed``. The same pair always gives the same clip."""
    captions, scene = sample(seed, indices)
    return Clips(render(scene), captions, scene, (seed, tuple(indices)))


# --- sampling -------------------------------------------------------------------------------------------------------


class _Draws:
    """Uniform numbers named by (seed, index, name): counter-based, so each stands alone whatever else is drawn."""

    def __init__(self, seed: int, indices: Sequence[int], future: int = 0) -> None:
        index_B = torch.tensor(list(indices), dtype=torch.int64)
        self._base_B = _mix(index_B + _mix(torch.tensor(seed, dtype=torch.int64)))
        if future:
            self._base_B = _mix(self._base_B + future)

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0, count: int | None = None) -> Tensor:
        """[B], or [B, count], float32 in [low, high)."""
        lanes = torch.arange(count or 1, dtype=torch.int64) + zlib.crc32(name.encode()) * 4096
        bits = _mix(self._base_B[:, None] ^ _mix(lanes)) & ((1 << 24) - 1)
        value = low + (high - low) * bits.to(torch.float32) / (1 << 24)
        return value if count else value[:, 0]

    def choice(self, name: str, count: int) -> list[int]:
        return (self.uniform(name) * count).long().tolist()


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64 tensors; products wrap, shifts are logical."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number, and so on below
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def sample(
    seed: int, indices: Sequence[int], caption: Caption | Sequence[Caption] | None = None, future: int = 0
) -> tuple[list[Caption], Scene]:
    """Draw captions and scenes; with ``caption`` every clip has that one, with as many as clips each has its own.

    Half of the drawn captions are closed (everything said), half leave at least one part open (design.md section 4).
    Another ``future`` keeps caption and first frame and draws again all that the two leave open.
    """
    draws = _Draws(seed, indices)
    if caption is None:
        captions = _captions(draws, len(indices))
    else:
        captions = [caption] * len(indices) if isinstance(caption, Caption) else list(caption)
    if len(captions) != len(indices):
        raise ValueError(f"sample wants one caption, or one for each of {len(indices)} clips; got {len(captions)}")
    return captions, _scene(draws, _Draws(seed, indices, future), captions)


def _captions(draws: _Draws, count: int) -> list[Caption]:
    closed = (draws.uniform("closed") < 0.5).tolist()
    colour = draws.choice("colour", len(COLOURS))
    shape = draws.choice("shape", len(SHAPES))
    motion = draws.uniform("motion").tolist()
    pace = draws.uniform("pace").tolist()
    camera = draws.uniform("camera").tolist()
    second = draws.uniform("second").tolist()
    out = []
    for i in range(count):
        kinds = CLOSED_MOTIONS if closed[i] else CLOSED_MOTIONS + OPEN_MOTIONS
        if SHAPES[shape[i]] in ROUND_SHAPES:
            kinds = tuple(m for m in kinds if m not in SPINNING)
        caption = Caption(
            colour=list(COLOURS)[colour[i]],
            shape=SHAPES[shape[i]],
            motion=kinds[int(motion[i] * len(kinds))],
            pace=list(PACES)[int(pace[i] * 2) % 2],
            camera=CAMERAS[int(camera[i] * 5) % 5],
        )
        if not closed[i]:
            # The same uniform number decides whether a part is said (its first half) and, above, what is said.
            caption = replace(
                caption,
                pace=list(PACES)[int(pace[i] * 4)] if pace[i] < 0.5 else None,
                camera=CAMERAS[int(camera[i] * 10)] if camera[i] < 0.5 else None,
                second=SHAPES[int(second[i] / 0.3 * 5)] if second[i] < 0.3 else None,
            )
            if caption.closed:
                caption = replace(caption, camera=None)
        out.append(caption)
    return out


def _scene(draws: _Draws, future: _Draws, captions: list[Caption]) -> Scene:
    """``draws`` decides what the first frame shows, ``future`` all that comes later and is not said."""
    count = len(captions)
    zero_B = torch.zeros(count)

    def per(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)

    motions = [c.motion for c in captions]
    open_pace_B = future.uniform("open pace", 0.35, 1.1)
    said_pace_B = per([PACES.get(c.pace or "", 0.0) for c in captions])
    k_B = torch.where(torch.tensor([c.pace is None for c in captions]), open_pace_B, said_pace_B)

    ranges = [_RADIUS.get(m, (0.30, 0.44)) for m in motions]
    low_B, high_B = per([low for low, _ in ranges]), per([high for _, high in ranges])
    start = [_START.get(m, (-0.45, 0.45, -0.45, 0.45)) for m in motions]
    box_B4 = torch.tensor(start, dtype=torch.float32).reshape(count, 4)
    position_B2 = box_B4[:, ::2] + (box_B4[:, 1::2] - box_B4[:, ::2]) * draws.uniform("position", count=2)

    direction_B = future.uniform("drift direction", 0, 2 * math.pi)
    drifts_B = per([float(m == "drifts") for m in motions])
    moves_B2 = torch.tensor([MOVES.get(m, (0.0, 0.0)) for m in motions], dtype=torch.float32).reshape(count, 2)
    travel_B2 = k_B[:, None] * (moves_B2 + drifts_B[:, None] * torch.stack([direction_B.cos(), direction_B.sin()], 1))

    either = future.choice("spin side", 2)
    spin_B = (
        2.4
        * k_B
        * per([{**SPINS, "spins": (-1.0, 1.0)[side]}.get(m, 0.0) for m, side in zip(motions, either, strict=True)])
    )
    growth_B = k_B * per([{"grows": 1.1, "shrinks": -0.65}.get(m, 0.0) for m in motions])
    bounce_B = per([0.5 if m == "bounces" else 0.0 for m in motions])

    points_B32 = future.uniform("way-points", -0.6, 0.6, count=6).reshape(count, 3, 2)
    wanders_B = per([float(m == "wanders") for m in motions])
    path_B32 = (wanders_B * k_B)[:, None, None] * (points_B32 - position_B2[:, None])

    open_camera = future.choice("open camera", len(CAMERAS))
    cameras = [c.camera or CAMERAS[o] for c, o in zip(captions, open_camera, strict=True)]
    colour_B3 = torch.tensor([COLOURS[c.colour] for c in captions]).reshape(count, 3)

    second_B = torch.tensor([SHAPES.index(c.second) if c.second else -1 for c in captions], dtype=torch.int64)
    second_radius_B = future.uniform("second radius", 0.34, 0.50)
    second_position_B2, second_travel_B2 = _crossing(future, second_radius_B)
    # Any of the other seven colours: two shapes of one colour would melt into each other.
    names = list(COLOURS)
    other = future.choice("second colour", len(COLOURS) - 1)
    second_colour_B3 = torch.tensor(
        [COLOURS[names[(names.index(c.colour) + 1 + o) % len(names)]] for c, o in zip(captions, other, strict=True)]
    ).reshape(count, 3)

    return Scene(
        shape_B=torch.tensor([SHAPES.index(c.shape) for c in captions], dtype=torch.int64),
        colour_B3=colour_B3,
        radius_B=low_B + (high_B - low_B) * draws.uniform("radius"),
        position_B2=position_B2,
        angle_B=draws.uniform("angle", -0.5, 0.5),
        growth_B=growth_B,
        spin_B=spin_B,
        travel_B2=travel_B2,
        bounce_B=bounce_B,
        bounce_rate_B=1 + k_B,
        path_B32=path_B32,
        onset_B=per([float(m in OPEN_MOTIONS) for m in motions]) * future.uniform("onset", 0, 0.4),
        pan_B=zero_B + per([{"camera pans left": -0.5, "camera pans right": 0.5}.get(c, 0.0) for c in cameras]),
        zoom_B=zero_B + per([{"camera zooms in": -0.6, "camera zooms out": 0.6}.get(c, 0.0) for c in cameras]),
        background_B23=_background(draws, colour_B3),
        wave_B4=torch.cat([draws.uniform("wave f", 0.5, 2.5)[:, None], draws.uniform("wave abc", 0, 6.28, count=3)], 1),
        texture_B4=torch.cat(
            [draws.uniform("texture f", 4.5, 7.5)[:, None], draws.uniform("texture phases", 0, 6.28, count=3)], 1
        ),
        second_shape_B=second_B,
        second_colour_B3=second_colour_B3,
        second_radius_B=second_radius_B,
        second_angle_B=future.uniform("second angle", -0.5, 0.5),
        second_position_B2=second_position_B2,
        second_travel_B2=second_travel_B2,
    )


_RADIUS = {"grows": (0.22, 0.30), "shrinks": (0.40, 0.52)}
# x low, x high, y low, y high of the start: a moving shape starts on the side that it leaves.
_START = {
    "moves left": (0.0, 0.6, -0.45, 0.45),
    "moves right": (-0.6, 0.0, -0.45, 0.45),
    "moves up": (-0.45, 0.45, 0.0, 0.6),
    "moves down": (-0.45, 0.45, -0.6, 0.0),
    "bounces": (-0.45, 0.45, -0.1, 0.4),
}


def _crossing(draws: _Draws, radius_B: Tensor) -> tuple[Tensor, Tensor]:
    """Start (at t = 0, outside the frame) and travel of a shape that touches a random side at a random time."""
    side_B = (draws.uniform("second side") * 4).long()
    enters_at_B = draws.uniform("second time", 0.1, 0.5)
    speed_B = draws.uniform("second speed", 1.0, 2.0)
    lane_B = draws.uniform("second lane", -0.6, 0.6)
    inward_B2 = torch.tensor([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0)])[side_B]
    across_B2 = inward_B2.flip(1).abs()
    # No kind reaches further than the corner of a triangle, 1.2 r.
    edge_B2 = -inward_B2 * (1 + 1.2 * radius_B)[:, None] + across_B2 * lane_B[:, None]
    return edge_B2 - inward_B2 * (speed_B * enters_at_B)[:, None], inward_B2 * speed_B[:, None]


def _background(draws: _Draws, colour_B3: Tensor) -> Tensor:
    """Two dim colours, at least .25 apart and each at least .35 from the shape's: the first of 64 drawn pairs."""
    pairs_BN23 = draws.uniform("background", 0.05, 0.75, count=64 * 6).reshape(-1, 64, 2, 3)
    apart_BN = (pairs_BN23[:, :, 0] - pairs_BN23[:, :, 1]).norm(dim=-1) >= 0.25
    # Clear of the shape's colour in the texture's troughs too.
    shades_BN43 = torch.cat([pairs_BN23, pairs_BN23 * (1 - TEXTURE_DEPTH)], dim=2)
    clear_BN = ((shades_BN43 - colour_B3[:, None, None]).norm(dim=-1) >= 0.35).all(-1)
    first_B = (apart_BN & clear_BN).int().argmax(1)
    return pairs_BN23[torch.arange(len(first_B)), first_B]


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Track:
    """What moves, frame by frame, in world coordinates: the part of a clip that its scene's motion decides."""

    centre_BT2: Tensor
    radius_BT: Tensor
    angle_BT: Tensor
    pan_BT: Tensor
    """Camera offset o: a world point is X = x z + o, Y = y z."""
    zoom_BT: Tensor
    """Camera scale z."""
    second_centre_BT2: Tensor

    def __getitem__(self, index: slice | Tensor) -> Track:
        return Track(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @property
    def screen_BT2(self) -> Tensor:
        """Centre of the (first) shape on the screen, frame units."""
        x_BT, y_BT = self.centre_BT2.unbind(-1)
        return torch.stack([x_BT - self.pan_BT, y_BT], -1) / self.zoom_BT[..., None]


def render(scene: Scene, frames_BT: Tensor | None = None, size: int = SIZE, chunk: int = 8) -> Tensor:
    """Draw a batch of scenes, ``video_BCTHW`` in [-1, 1].

    Args:
        scene: B scenes.
        frames_BT: which of the ``NUM_FRAMES`` frames to draw of each clip; all of them by default.
        size: height and width in pixels; the softness of an edge is a pixel of that size.
        chunk: so many clips at a time keep the work in the processor's cache.
    """
    if frames_BT is None:
        frames_BT = torch.arange(NUM_FRAMES).expand(len(scene), -1)
    t_BT = frames_BT.to(scene.radius_B) / (NUM_FRAMES - 1)
    parts = (slice(i, i + chunk) for i in range(0, len(scene), chunk))
    return torch.cat([draw(scene[part], track(scene[part], t_BT[part]), size) for part in parts])


def trajectory(scene: Scene) -> Tensor:
    """Centre of the (first) shape on the *screen* at each frame, ``[B, T, 2]``, frame units."""
    return track(scene).screen_BT2


def track(scene: Scene, t_BT: Tensor | None = None) -> Track:
    """The world's laws of motion: where everything is at the times ``t_BT`` in [0, 1] (by default, of all frames)."""
    if t_BT is None:
        t_BT = torch.linspace(0, 1, NUM_FRAMES, device=scene.radius_B.device).expand(len(scene), -1)
    onset_B1 = scene.onset_B[:, None]
    s_BT = ((t_BT - onset_B1) / (1 - onset_B1)).clamp(min=0)  # how far the motion has come
    wander_BT2 = torch.einsum("btp,bpd->btd", wander_basis(s_BT), scene.path_B32)
    rise_BT = scene.bounce_B[:, None] * torch.sin(math.pi * scene.bounce_rate_B[:, None] * s_BT).abs()
    straight_BT2 = scene.position_B2[:, None] + scene.travel_B2[:, None] * s_BT[..., None]
    zoom_B1 = scene.zoom_B[:, None]
    return Track(
        centre_BT2=straight_BT2 + wander_BT2 - torch.stack([torch.zeros_like(rise_BT), rise_BT], -1),
        radius_BT=scene.radius_B[:, None] * (1 + scene.growth_B[:, None] * s_BT),
        angle_BT=scene.angle_B[:, None] + scene.spin_B[:, None] * s_BT,
        pan_BT=scene.pan_B[:, None] * t_BT,
        zoom_BT=torch.where(zoom_B1 < 0, 1 / (1 - zoom_B1 * t_BT), 1 + zoom_B1 * t_BT),
        second_centre_BT2=scene.second_position_B2[:, None] + scene.second_travel_B2[:, None] * t_BT[..., None],
    )


def wander_basis(s: Tensor) -> Tensor:
    """``[..., 3]``: weights of the three way-points when the motion has come as far as ``s`` in [0, 1].

    A cubic through the start and the points at s = 1/3, 2/3, 1 (Lagrange): smooth, and it meets each point.
    """
    u = 3 * s
    return torch.stack([u * (u - 2) * (u - 3) / 2, u * (u - 1) * (u - 3) / -2, u * (u - 1) * (u - 2) / 6], -1)


def draw(scene: Scene, moved: Track, size: int = SIZE) -> Tensor:
    """The frames of ``moved``, with everything that keeps (colours, kinds, background) from ``scene``."""
    X_BT1W, Y_BTH1 = _grid(moved, size)
    image_BCTHW = _background_of(scene, X_BT1W, Y_BTH1)
    image_BCTHW = _paint(
        image_BCTHW, scene.shape_B, scene.colour_B3, moved.centre_BT2, moved.radius_BT, moved.angle_BT, X_BT1W, Y_BTH1
    )
    enters_N = torch.nonzero(scene.second_shape_B >= 0)[:, 0]
    if len(enters_N):
        second, still_N1 = scene[enters_N], torch.ones_like(moved.pan_BT[enters_N, :1])
        painted = _paint(
            image_BCTHW[enters_N], second.second_shape_B, second.second_colour_B3, moved.second_centre_BT2[enters_N],
            second.second_radius_B[:, None] * still_N1, second.second_angle_B[:, None] * still_N1,
            X_BT1W[enters_N], Y_BTH1[enters_N],
        )  # fmt: skip
        image_BCTHW = image_BCTHW.index_copy(0, enters_N, painted)
    return image_BCTHW * 2 - 1


def draw_background(scene: Scene, moved: Track, size: int = SIZE) -> Tensor:
    """What ``draw`` shows behind the shapes."""
    return _background_of(scene, *_grid(moved, size)) * 2 - 1


def _grid(moved: Track, size: int) -> tuple[Tensor, Tensor]:
    """World coordinates of the pixels. They are separable: X depends on the column, Y on the row."""
    pixel_N = (torch.arange(size, device=moved.pan_BT.device) + 0.5) * (2 / size) - 1
    X_BT1W = (moved.zoom_BT[..., None] * pixel_N + moved.pan_BT[..., None])[:, :, None, :]
    return X_BT1W, (moved.zoom_BT[..., None] * pixel_N)[:, :, :, None]


def _background_of(scene: Scene, X_BT1W: Tensor, Y_BTH1: Tensor) -> Tensor:
    f, a, b, c = (v[:, None, None, None] for v in scene.wave_B4.unbind(1))
    bend_BTHW = 0.7 * torch.sin(2.3 * (X_BT1W * c.cos() + Y_BTH1 * c.sin()))
    wave_BTHW = 0.5 + 0.5 * torch.sin(f * (X_BT1W * a.cos() + Y_BTH1 * a.sin()) + b + bend_BTHW)
    f, a, b, c = (v[:, None, None, None] for v in scene.texture_B4.unbind(1))
    ripple_BTHW = torch.sin(f * (X_BT1W * a.cos() + Y_BTH1 * a.sin()) + b)
    across_BTHW = torch.sin(f * (Y_BTH1 * a.cos() - X_BT1W * a.sin()) + c)
    shade_B1THW = (1 - TEXTURE_DEPTH * (0.5 + 0.25 * (ripple_BTHW + across_BTHW)))[:, None]
    first_B3, second_B3 = scene.background_B23.unbind(1)
    image_BCTHW = first_B3[:, :, None, None, None] + (second_B3 - first_B3)[:, :, None, None, None] * wave_BTHW[:, None]
    return image_BCTHW * shade_B1THW


def _paint(
    image_BCTHW: Tensor, shape_B: Tensor, colour_B3: Tensor, centre_BT2: Tensor, radius_BT: Tensor, angle_BT: Tensor,
    X_BT1W: Tensor, Y_BTH1: Tensor,
) -> Tensor:  # fmt: skip
    """Lay one shape over the picture, lit by a soft vertical gradient."""
    dx_BT1W = X_BT1W - centre_BT2[..., 0][..., None, None]
    dy_BTH1 = Y_BTH1 - centre_BT2[..., 1][..., None, None]
    cos, sin = angle_BT.cos()[..., None, None], angle_BT.sin()[..., None, None]
    u_BTHW = cos * dx_BT1W + sin * dy_BTH1  # R(-angle) (X - px, Y - py)
    v_BTHW = cos * dy_BTH1 - sin * dx_BT1W
    r_BT11 = radius_BT[..., None, None]

    sdf_BTHW = torch.empty_like(u_BTHW)
    for kind in shape_B.unique().tolist():
        rows = torch.nonzero(shape_B == kind)[:, 0]
        drawn = _SDF[SHAPES[kind]](u_BTHW[rows], v_BTHW[rows], r_BT11[rows])
        sdf_BTHW = sdf_BTHW.index_copy(0, rows, drawn)
    coverage_B1THW = torch.sigmoid(-0.9 * X_BT1W.shape[-1] * sdf_BTHW)[:, None]  # -57.6 at 64 pixels
    light_BTH1 = 1 - 0.25 * dy_BTH1.clamp(-1, 1)
    lit_BCTH1 = (colour_B3[:, :, None, None, None] * light_BTH1[:, None]).clamp(max=1)
    return image_BCTHW + (lit_BCTH1 - image_BCTHW) * coverage_B1THW


def _distance(u: Tensor, v: Tensor) -> Tensor:
    return (u * u + v * v + 1e-12).sqrt()  # the small term keeps the gradient finite at the centre


def _circle(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return _distance(u, v) - r


def _ring(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return (_distance(u, v) - 0.8 * r).abs() - 0.25 * r


def _square(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.85 * r


def _triangle(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    return torch.maximum(v, 0.866 * u.abs() - 0.5 * v) - 0.6 * r


def _star(u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    distance = _distance(u, v)
    cosine = u / distance
    square = cosine * cosine
    five = cosine * (5 + square * (16 * square - 20))  # cos 5 theta, Chebyshev, with theta = atan2(v, u)
    return distance - r * (0.72 + 0.3 * five)


_SDF = {"circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "ring": _ring}
