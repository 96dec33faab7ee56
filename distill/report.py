"""For people: contact sheets, bars, animations, the report of a run."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import Tensor


def contact_sheet(
    path: Path, videos_BCTHW: list[Tensor], num_columns: int = 6, inputs_BCHW: Tensor | None = None
) -> None:
    """One PNG: for each clip a band, in it a row for each of ``videos_BCTHW``, evenly spaced frames across.

    Args:
        path: written aside and renamed.
        videos_BCTHW: batches of equal shape, for example ground truth and result, values in [-1, 1].
        num_columns: frames shown of each clip, first and last among them.
        inputs_BCHW: the pictures that the clips were made from, shown once at the left of each band.
    """
    videos_BCTHW = [shown_frames(video_BCTHW, num_columns) for video_BCTHW in videos_BCTHW]
    bands = []
    for clip in range(len(videos_BCTHW[0])):
        for row, video in enumerate(videos_BCTHW):
            tiles = list(video[clip].float().clamp(-1, 1).unbind(1))
            if inputs_BCHW is not None:
                tile = inputs_BCHW[clip] if row == 0 else torch.ones_like(inputs_BCHW[clip])
                tiles = [tile, torch.ones_like(tile[:, :, :4]), *tiles]
            bands.append(torch.cat(tiles, dim=2))
        bands.append(torch.ones(3, 4, bands[-1].shape[-1]))  # a white rule under each clip
    sheet_CHW = torch.cat(bands[:-1], dim=1)
    pixels_HWC = ((sheet_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.png")
    Image.fromarray(pixels_HWC.numpy()).resize((pixels_HWC.shape[1] * 2, pixels_HWC.shape[0] * 2), 0).save(aside)
    os.replace(aside, path)


def shown_frames(video_BCTHW: Tensor, num_columns: int = 6) -> Tensor:
    """The frames of videos that a contact sheet has."""
    num_frames = video_BCTHW.shape[2]
    return video_BCTHW[:, :, torch.linspace(0, num_frames - 1, min(num_columns, num_frames)).round().long()]


def write(path: Path, text: str) -> None:
    """A text, whole or not at all: written aside and renamed."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def save(figure: Figure, path: Path) -> None:
    """A plot as PNG, likewise."""
    aside = path.with_suffix(".tmp.png")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)


def bars(path: Path, groups: dict[str, dict[str, tuple[float, float, float]]], title: str) -> None:
    """Horizontal bars with 95 % intervals: for each name of a metric one bar for each group.

    Args:
        path: PNG, written aside and renamed.
        groups: group -> metric -> (mean, low, high).
        title: over the plot.
    """
    names = list(next(iter(groups.values())))
    height = 0.8 / len(groups)
    figure = Figure(figsize=(7, 0.6 + len(names) * (0.25 + 0.16 * len(groups))), layout="constrained")
    axes = figure.subplots()
    for number, (group, values) in enumerate(groups.items()):
        means, lows, highs = zip(*(values[name] for name in names), strict=True)
        places = [row + number * height for row in range(len(names))]
        below = [mean - low for mean, low in zip(means, lows, strict=True)]
        above = [high - mean for mean, high in zip(means, highs, strict=True)]
        axes.barh(places, means, height, label=group, xerr=[below, above], capsize=2)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.05)
    axes.set_title(title)
    axes.legend(fontsize="small")
    save(figure, path)


def columns(path: Path, values: Sequence[float], errors: Sequence[float], kinds: Sequence[str], title: str) -> None:
    """Upright bars with error bars, one for each block, a colour for each kind. PNG, written aside and renamed."""
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for kind in sorted(set(kinds)):
        places = [i for i, own in enumerate(kinds) if own == kind]
        axes.bar(places, [values[i] for i in places], yerr=[errors[i] for i in places], capsize=3, label=kind)
    axes.set_xticks(range(len(values)))
    axes.set_xlabel("block")
    axes.set_yscale("symlog", linthresh=max(min(abs(v) for v in values), 1e-6))
    axes.set_title(title)
    axes.legend(fontsize="small")
    save(figure, path)


def scatter(
    path: Path, points: dict[str, tuple[float, tuple[float, float, float]]], x_label: str, y_label: str
) -> None:
    """A named point with its interval for each; the horizontal axis is logarithmic. PNG, written aside and renamed.

    Args:
        path: where to.
        points: name -> (x, (mean, low, high)).
        x_label: of the horizontal axis.
        y_label: of the vertical one.
    """
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, (x, (mean, low, high))) in enumerate(points.items()):
        marker = "o^sDvP*X"[number % 8]
        axes.errorbar([x], [mean], yerr=[[mean - low], [high - mean]], fmt=marker, capsize=2, label=name)
    axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    save(figure, path)


def side_by_side(path: Path, videos_BCTHW: dict[str, Tensor], frames: int = 4, margin: int = 150) -> None:
    """One PNG: a named row for each of ``videos_BCTHW``, in it every clip by some evenly spaced frames.

    Args:
        path: written aside and renamed.
        videos_BCTHW: name -> the same clips, values in [-1, 1].
        frames: of each clip, first and last among them.
        margin: pixels for the names.
    """
    rows, gap = [], 4
    for video in videos_BCTHW.values():
        columns = torch.linspace(0, video.shape[2] - 1, frames).round().long()
        tiles = [torch.cat([*clip[:, columns].unbind(1), torch.ones(3, video.shape[3], gap)], 2) for clip in video]
        rows.append(torch.cat([torch.ones(3, video.shape[3], margin), *tiles], dim=2).clamp(-1, 1))
    pixels_HWC = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    sheet = Image.fromarray(pixels_HWC.numpy())
    draw = ImageDraw.Draw(sheet)
    for number, name in enumerate(videos_BCTHW):
        draw.text((4, number * rows[number].shape[1] + rows[number].shape[1] // 2 - 6), name, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.png")
    sheet.save(aside)
    os.replace(aside, path)


def events(folder: Path) -> list[dict[str, Any]]:
    """Every complete line of a run's `events.jsonl`."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def seconds_by_stage(folder: Path) -> dict[str, float]:
    """How long each stage of a run took. Gaps of more than ten minutes between two events are pauses."""
    seconds: dict[str, float] = defaultdict(float)
    past = None
    for event in events(folder):
        if past is not None and 0 <= event["time"] - past <= 600:
            seconds[event["stage"]] += event["time"] - past
        past = event["time"]
    return dict(seconds)


def run_report(folder: Path, lines: dict[str, str]) -> None:
    """`report.md` of a distillation: what was made, how long each stage took, what was seen last in each."""
    last: dict[str, dict[str, Any]] = defaultdict(dict)
    for event in events(folder):
        last[event["stage"]].update({k: v for k, v in event.items() if k not in ("time", "stage", "step", "steps")})
    text = [f"# {folder.name}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())]
    text += ["", "| stage | minutes | last seen |", "|---|---:|---|"]
    for stage, seconds in seconds_by_stage(folder).items():
        seen = ", ".join(f"{k} {v:.4g}" for k, v in last[stage].items() if isinstance(v, float))
        text.append(f"| {stage} | {seconds / 60:.1f} | {seen} |")
    text += ["", "![importance](importance.png)", "", "Drawn, teacher, student:", "", "![samples](samples/student.png)"]
    write(folder / "report.md", "\n".join(text) + "\n")


def animation(path: Path, videos_BCTHW: list[Tensor], fps: int, columns: int = 2, scale: int = 2) -> None:
    """An animated WebP: each clip's videos side by side, ``columns`` clips to a row; the last frame stays for a second.

    Args:
        path: written aside and renamed.
        videos_BCTHW: batches of equal shape, for example input (repeated), ground truth and result, in [-1, 1].
        fps: frames a second.
        columns: clips to a row; what is left over of the last row stays white.
        scale: pixels on the screen for each pixel.
    """
    batch, _, num_frames, height, width = videos_BCTHW[0].shape
    rows = -(-batch // columns)
    cell_height, cell_width = height + 4, len(videos_BCTHW) * width + 12
    canvas_TCHW = torch.ones(num_frames, 3, rows * cell_height, columns * cell_width)
    for clip in range(batch):
        beside = torch.cat([video[clip].float().clamp(-1, 1) for video in videos_BCTHW], dim=-1).transpose(0, 1)
        top, left = clip // columns * cell_height, clip % columns * cell_width
        canvas_TCHW[:, :, top : top + height, left : left + beside.shape[-1]] = beside
    pixels_THWC = ((canvas_TCHW + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    size = (pixels_THWC.shape[2] * scale, pixels_THWC.shape[1] * scale)
    frames = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in pixels_THWC]
    durations = [1000 // fps] * (num_frames - 1) + [1000]
    aside = path.with_suffix(".tmp.webp")
    frames[0].save(aside, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=80, method=6)
    os.replace(aside, path)
