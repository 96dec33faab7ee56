"""Students for tests: the bundled one with other weights, so that its videos are other ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from distill.student import Card, read_card, write_student
from tests.stack import ROOT
from worker.contract import GateSummary

BUNDLED = ROOT / "models" / "shapes-4step"
TEACHER = ROOT / "models" / "shapes-teacher"


def make_student(out: Path, name: str = "shapes-4step", factor: float = 1.05, *, without_last: bool = False) -> Card:
    """A whole student folder whose last layer is ``factor`` times the bundled one's; ``without_last`` of its blocks."""

    def save_parts(aside: Path) -> None:
        for part in ("transformer", "scheduler"):
            shutil.copytree(BUNDLED / part, aside / part)
        shutil.copy(BUNDLED / "model_index.json", aside)
        weights_file = aside / "transformer" / "diffusion_pytorch_model.safetensors"
        weights = load_file(weights_file)
        weights["proj_out.weight"] = weights["proj_out.weight"] * factor
        if without_last:
            config_file = aside / "transformer" / "config.json"
            config = json.loads(config_file.read_text())
            config["num_layers"] -= 1
            config_file.write_text(json.dumps(config))
            weights = {name: w for name, w in weights.items() if not name.startswith(f"blocks.{config['num_layers']}.")}
        save_file(weights, weights_file, metadata={"format": "pt"})

    return write_student(out, TEACHER, read_card(BUNDLED).model_copy(update={"name": name}), save_parts)


def make_t2v_student(out: Path, name: str = "shapes-t2v") -> Card:
    """A text-to-video student: the bundled one's networks in the stock pipeline that is given no first frame."""

    def save_parts(aside: Path) -> None:
        for part in ("transformer", "scheduler"):
            shutil.copytree(BUNDLED / part, aside / part)
        index = json.loads((BUNDLED / "model_index.json").read_text())
        index |= {"_class_name": "WanPipeline", "expand_timesteps": False}
        parts = {key: value for key, value in index.items() if not key.startswith("image_")}
        (aside / "model_index.json").write_text(json.dumps(parts, indent=2))

    changes = {"name": name, "backbone": "wan-t2v", "task": "t2v"}
    return write_student(out, TEACHER, read_card(BUNDLED).model_copy(update=changes), save_parts)


def passed(against: str) -> GateSummary:
    """A verdict that lets a student be served in the place of another."""
    return GateSummary(passed=True, refusals=[], against=against, recipe="shapes", at=0.0)
