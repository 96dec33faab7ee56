"""Features for `fvd_shapes`: a small classifier of the world's clips, and the Frechet distance between two sets.

The classifier names what a clip shows (shape, colour, motion, camera, a second shape); its last 64 features then say
how far apart two sets of clips are as *distributions*, which no clip-by-clip metric does (Unterthiner et al. 2018, with
a network of this world in place of one of real videos).

Shape suffixes: B clip, C channel, T frame, H row, W column, D feature.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from distill import fitting
from distill.config import FeaturesConfig
from distill.data import shapes
from distill.loop import Run, fit, remember, training_device

FEATURES = 64
_MOTIONS = (*shapes.CLOSED_MOTIONS, *shapes.OPEN_MOTIONS)
_HEADS = {"shape": len(shapes.SHAPES), "colour": len(shapes.COLOURS), "motion": len(_MOTIONS), "camera": 5, "second": 2}


class ClipClassifier(nn.Module):
    """Four convolutions over space and time, 64 features, one head for each thing to name."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 48, 64, FEATURES)
        strides = ((1, 4, 4), (2, 2, 2), (2, 2, 2), (2, 2, 2))
        layers: list[nn.Module] = []
        before = 3
        for width, stride in zip(widths, strides, strict=True):
            kernel = (3, 5, 5) if stride[1] == 4 else (3, 3, 3)
            padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
            layers += [nn.Conv3d(before, width, kernel, stride, padding), nn.GroupNorm(8, width), nn.SiLU()]
            before = width
        self.body = nn.Sequential(*layers)
        self.features = nn.Linear(FEATURES * 3 * 2 * 2, FEATURES)
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, count) for name, count in _HEADS.items()})

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """``features_BD`` of videos in [-1, 1]."""
        return self.features(self.body(video_BCTHW).flatten(1))

    def logits(self, features_BD: Tensor) -> dict[str, Tensor]:
        """What each head says."""
        return {name: head(F.silu(features_BD)) for name, head in self.heads.items()}


def labels(captions: list[shapes.Caption], scene: shapes.Scene) -> dict[str, Tensor]:
    """What the heads should say of drawn clips: what they show, said or not."""
    return {
        "shape": scene.shape_B,
        "colour": torch.tensor([list(shapes.COLOURS).index(c.colour) for c in captions]),
        "motion": torch.tensor([_MOTIONS.index(c.motion) for c in captions]),
        "camera": torch.tensor([shapes.CAMERAS.index(camera) for camera in fitting.cameras(scene)]),
        "second": (scene.second_shape_B >= 0).long(),
    }


def teach(folder: Path, config: FeaturesConfig) -> Path:
    """Train the classifier and write `FOLDER/model.safetensors` with its accuracies on the dev split.

    Raises:
        ConfigError: the run folder was begun with another configuration.
        Interrupted: a signal came; the same command goes on.
    """
    remember(folder, config)
    run = Run(folder, config.seed)
    torch.manual_seed(config.seed)
    device = training_device()
    model = ClipClassifier().to(device)
    held_out = shapes.clips(0, shapes.SPLITS["dev"][:256])

    def loss(step: int, _generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        start = shapes.SPLITS["train"].start + step * config.fit.batch
        drawn = shapes.clips(config.seed, range(start, start + config.fit.batch))
        wanted = labels(drawn.captions, drawn.scene)
        with torch.autocast(device.type, torch.bfloat16):
            said = model.logits(model(drawn.video_BCTHW.to(device)))
        wrong = [F.cross_entropy(said[name].float(), wanted[name].to(device)) for name in said]
        return torch.stack(wrong).sum(), {}

    @torch.no_grad()
    def accuracies() -> dict[str, float]:
        said = model.logits(model(held_out.video_BCTHW.to(device)))
        wanted = labels(held_out.captions, held_out.scene)
        return {name: (said[name].argmax(1).cpu() == wanted[name]).float().mean().item() for name in said}

    with run.handling_signals():
        fit(run, "features", model, loss, config.fit, lambda _sheet: accuracies())
        out = folder / "model.safetensors"
        aside = out.with_suffix(".tmp")
        save_model(model.half(), str(aside))
        os.replace(aside, out)
        model.float()  # in the rounding of what is stored
        found = {name: round(value, 3) for name, value in accuracies().items()}
        (folder / "accuracy.json").write_text(json.dumps(found) + "\n")
    return out


def load(path: Path) -> ClipClassifier:
    """The classifier of a `model.safetensors`, in full precision."""
    model = ClipClassifier().half()
    load_model(model, str(path))
    return model.float().eval().requires_grad_(False)


def frechet_distance(ours_ND: Tensor, theirs_MD: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, equation 6).

    Raises:
        ValueError: fewer samples than features: the covariance would be singular.
    """
    if min(len(ours_ND), len(theirs_MD)) <= ours_ND.shape[1]:
        raise ValueError(
            f"the Frechet distance of {ours_ND.shape[1]} features wants more samples than that on both sides; "
            f"got {len(ours_ND)} and {len(theirs_MD)}: evaluate more clips"
        )
    ours, theirs = ours_ND.double(), theirs_MD.double()
    cov_1, cov_2 = ours.T.cov(), theirs.T.cov()
    values, vectors = torch.linalg.eigh(cov_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_2 @ root).clamp(min=0).sqrt().sum()
    return float((ours.mean(0) - theirs.mean(0)).square().sum() + cov_1.trace() + cov_2.trace() - 2 * cross)
