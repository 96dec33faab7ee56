"""Every model that can be had, at tiny size, on its way from a download to a student. Each step is made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from distill import recipes
from distill.__main__ import main
from distill.config import DistillConfig
from distill.run import distil
from tests import tiny
from tests.distill.tiny import settings
from tests.footage import film

RECIPES = {
    "ti2v-5b": "wan2.2-ti2v-5b",
    "i2v-14b": "wan2.1-i2v-14b",
    "i2v-a14b": "wan2.2-i2v-a14b",
    "t2v-1.3b": "wan2.1-t2v-1.3b",
    "t2v-a14b": "wan2.1-t2v-1.3b",
    "hunyuan-t2v": "hunyuanvideo-t2v",
    "hunyuan-i2v": "hunyuanvideo-i2v",
    "hunyuan-i2v-concat": "hunyuanvideo-i2v",
    "hunyuan15-t2v": "hunyuanvideo-t2v",
    "hunyuan15-i2v": "hunyuanvideo-i2v",
}
"""By variant of `tests.tiny`, the recipe."""
SMALL = {
    "preset": "smoke",
    "precision": "float32",
    "watched": 2,
    "importance.rho": 0.3,
    "importance.clips": 2,
    "pruning.unimportant": 1.0,
    "pruning.drift_limit": 1e9,
    "pruning.fit.accumulate": 1,
    "pruning.fit.batch": 2,
    "matching.fit.accumulate": 1,
    "matching.critic.rank": 2,
}


class RealModels:
    """Folders of each variant: the downloaded one with its card, the data prepared for it, the run, the student."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.teacher = cache(self._teacher)
        self.data = cache(self._data)
        self.run = cache(self._run)

    def student(self, variant: str) -> Path:
        return self.run(variant) / "student"

    def recipe(self, variant: str, **more: object) -> DistillConfig:
        values = {"teacher": str(self.teacher(variant)), "data": str(self.data(variant)), "name": variant}
        return recipes.load(RECIPES[variant], settings({**SMALL, **values, **more}))

    def _teacher(self, variant: str) -> Path:
        folder = tiny.folder(variant, self._root / "teachers" / variant)
        call = tiny.call(variant, num_inference_steps=2)
        assert main(["adopt", str(folder), *(f"--set={name}={value}" for name, value in call.items())]) == 0
        return folder

    def _data(self, variant: str) -> Path:
        out = self._root / "data" / variant
        source, teacher = str(self._footage()), str(self.teacher(variant))
        assert main(["prepare", source, str(out), "--model", teacher, "--set", "held_out=0.4"]) == 0
        return out

    def _run(self, variant: str) -> Path:
        folder = self._root / "runs" / variant
        distil(folder, self.recipe(variant))
        return folder

    def _footage(self) -> Path:
        """Six short videos of a square that goes somewhere, with captions."""
        folder = self._root / "footage"
        if not folder.exists():
            folder.mkdir(parents=True)
            for number in range(6):

                def draw(second: float, width: int, height: int, number: int = number) -> np.ndarray:
                    frame = np.full((height, width, 3), 40 + 30 * number, np.uint8)
                    left = number * 4 + round(20 * second)
                    frame[10:26, left : left + 12] = (200, 30 * number, 90)
                    return frame

                (folder / f"{number}.mp4").write_bytes(film(seconds=1, fps=16, width=48, height=48, draw=draw))
                (folder / f"{number}.txt").write_text(f"a square number {number} moves right")
        return folder
