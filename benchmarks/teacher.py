"""How good the bundled teacher is, on clips it has never seen: `python -m benchmarks.teacher [FOLDER]`.

A first, small set of numbers (the metrics of the whole world come with `distill evaluate`):

- the autoencoder's PSNR on whole clips, mean and by frame position;
- closed captions that move the shape under a static camera: where the shape is, by the centre of what has its colour,
  against where the drawn clip has it, in pixels. The same tracker on the drawn clips shows its own error, and on clips
  that stand still how bad an answer can be;
- in what share of them the shape goes the way that the sentence says (within 45 degrees, at least a quarter as far).

Writes Markdown and a contact sheet beside this file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from distill import losses, report, sampler, student
from distill.backbones import wan
from distill.data import shapes

HERE = Path(__file__).resolve().parent


def main() -> int:
    """Measure on the test split and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE.parent / "models" / "shapes-teacher")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--out", type=Path, default=HERE / "teacher.md")
    options = parser.parse_args()
    card = student.read_card(options.folder)
    pipe = DiffusionPipeline.from_pretrained(options.folder, dtype=torch.float32, local_files_only=True)
    pipe.vae.requires_grad_(False)

    with torch.no_grad():
        drawn = shapes.clips(0, shapes.SPLITS["test"][: options.clips])
        decoded = torch.cat([_reconstruct(pipe.vae, part) for part in drawn.video_BCTHW.split(16)])
        psnr_T = losses.psnr_db(decoded, drawn.video_BCTHW).mean(0)
        moving, asked = _moving_clips(options.clips)
        made = _generate(pipe, moving, card.call)

    errors = {
        "the drawn clips (the tracker's own error)": _error_px(moving, moving.video_BCTHW),
        f"**{card.name}**, {card.call['num_inference_steps']} steps, guidance {card.call['guidance_scale']}": _error_px(
            moving, made
        ),
        "standing still at the first frame": _error_px(moving, moving.video_BCTHW[:, :, :1].expand_as(made)),
    }
    follows = _follows(moving, made, asked)
    rows = "\n".join(f"| {name} | {error:.2f} |" for name, error in errors.items())
    options.out.write_text(f"""# {card.name}: first numbers

`python -m benchmarks.teacher`: test split, {options.clips} clips for each line, seed 0, sha256 {card.sha256[:12]}.

Autoencoder on whole clips: **{psnr_T.mean():.1f} dB**, worst frame position {psnr_T.min():.1f} dB.
By frame: {" ".join(f"{value:.1f}" for value in psnr_T.tolist())}

Closed captions with a moving shape and a static camera:

| mean distance of the shape from where it should be, px | |
|---|---:|
{rows}

The shape goes the way that the sentence says in **{follows:.0%}** of the clips.
""")
    show = 10
    report.contact_sheet(options.out.with_suffix(".png"), [moving.video_BCTHW[:show], made[:show]])
    sys.stdout.write(options.out.read_text())
    return 0


def _reconstruct(vae: torch.nn.Module, video_BCTHW: Tensor) -> Tensor:
    return wan.decode_latents(vae, wan.encode_video(vae, video_BCTHW))


def _moving_clips(count: int) -> tuple[shapes.Clips, Tensor]:
    """``count`` clips of the test split with every colour, shape and direction in turn; and the asked directions."""
    videos, captions, directions, scenes = [], [], [], []
    for i in range(count):
        motion = list(shapes.MOVES)[i % 4]
        shape = shapes.SHAPES[i // 4 % 5]
        colour = list(shapes.COLOURS)[i % 8]
        pace = list(shapes.PACES)[i // 2 % 2]
        caption = shapes.Caption(colour, shape, motion, pace, "static camera")
        _, scene = shapes.sample(0, [shapes.SPLITS["test"][i]], caption)
        videos.append(shapes.render(scene))
        captions.append(caption)
        scenes.append(scene)
        directions.append(shapes.MOVES[motion])
    fields = {name: torch.cat([getattr(s, name) for s in scenes]) for name in scenes[0].__dataclass_fields__}
    return shapes.Clips(torch.cat(videos), captions, shapes.Scene(**fields)), torch.tensor(directions)


def _generate(pipe: DiffusionPipeline, clips: shapes.Clips, call: dict[str, object]) -> Tensor:
    parts = []
    for first in range(0, len(clips.captions), 16):
        images = clips.video_BCTHW[first : first + 16, :, 0]
        prompts = [str(caption) for caption in clips.captions[first : first + 16]]
        parts.append(sampler.sample(pipe, images, prompts, call, seed=first))
    return torch.cat(parts)


def _track(clips: shapes.Clips, video_BCTHW: Tensor) -> Tensor:
    """Centre ``[B, T, 2]``, in frame units, of the pixels that have about the shape's colour."""
    rgb_BCTHW = video_BCTHW / 2 + 0.5
    colour = clips.scene.colour_B3[:, :, None, None, None]
    distance_BTHW = (rgb_BCTHW - colour).norm(dim=1)
    weight_BTHW = torch.sigmoid((0.2 - distance_BTHW) * 40) + 1e-6
    axis = (torch.arange(shapes.SIZE) + 0.5) * (2 / shapes.SIZE) - 1
    total_BT = weight_BTHW.sum(dim=(2, 3))
    x_BT = (weight_BTHW * axis).sum(dim=(2, 3)) / total_BT
    y_BT = (weight_BTHW * axis[:, None]).sum(dim=(2, 3)) / total_BT
    return torch.stack([x_BT, y_BT], -1)


def _error_px(clips: shapes.Clips, video_BCTHW: Tensor) -> float:
    """Mean distance of the tracked centre from the renderer's own trajectory.

    Frames in which the shape leaves the picture are left out.
    """
    truth_BT2 = shapes.trajectory(clips.scene)
    inside_BT = (truth_BT2.abs() + clips.scene.radius_B[:, None, None] < 1).all(-1)
    error_BT = (_track(clips, video_BCTHW) - truth_BT2).norm(dim=-1) * shapes.SIZE / 2
    return error_BT[inside_BT].mean().item()


def _follows(clips: shapes.Clips, video_BCTHW: Tensor, asked_B2: Tensor) -> float:
    path_BT2 = _track(clips, video_BCTHW)
    went_B2 = path_BT2[:, -1] - path_BT2[:, 0]
    truth_BT2 = _track(clips, clips.video_BCTHW)
    far_B = (truth_BT2[:, -1] - truth_BT2[:, 0]).norm(dim=1)
    along_B = (went_B2 * asked_B2).sum(1)
    return ((along_B > 0.7071 * went_B2.norm(dim=1)) & (along_B > far_B / 4)).float().mean().item()


if __name__ == "__main__":
    raise SystemExit(main())
