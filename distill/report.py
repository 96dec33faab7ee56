"""Pictures for people: contact sheets."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor


def contact_sheet(path: Path, videos_BCTHW: list[Tensor], num_columns: int = 6) -> None:
    """One PNG: for each clip a band, in it a row for each of ``videos_BCTHW``, evenly spaced frames across.

    Args:
        path: written aside and renamed.
        videos_BCTHW: batches of equal shape, for example ground truth and result, values in [-1, 1].
        num_columns: frames shown of each clip, first and last among them.
    """
    num_frames = videos_BCTHW[0].shape[2]
    columns = torch.linspace(0, num_frames - 1, min(num_columns, num_frames)).round().long()
    bands = []
    for clip in range(len(videos_BCTHW[0])):
        for video in videos_BCTHW:
            bands.append(torch.cat(list(video[clip][:, columns].float().clamp(-1, 1).unbind(1)), dim=2))
        bands.append(torch.ones(3, 4, bands[-1].shape[-1]))  # a white rule under each clip
    sheet_CHW = torch.cat(bands[:-1], dim=1)
    pixels_HWC = ((sheet_CHW + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp.png")
    Image.fromarray(pixels_HWC.numpy()).resize((pixels_HWC.shape[1] * 2, pixels_HWC.shape[0] * 2), 0).save(aside)
    os.replace(aside, path)
