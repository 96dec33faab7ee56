"""What test_distributed.py lets two processes do: `torchrun --nproc-per-node 2 two_processes.py FOLDER`.

FOLDER holds configurations as JSON, by the name of the run that each is for.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest
from torch.distributed.device_mesh import init_device_mesh

from distill.config import ConfigError, DistillConfig
from distill.distributed import World, joined
from distill.loop import Interrupted
from distill.run import distil
from distill.stages import pruning


def main(root: Path) -> None:
    def config(name: str) -> DistillConfig:
        return DistillConfig.model_validate_json((root / f"{name}.json").read_text())

    with joined() as world:
        distil(root / "whole", config("whole"), None, world)
        distil(root / "experts", config("experts"), None, world)
        killed_before_its_report(root, config("experts"), world)
        interrupted(root, config("whole"), world)
        distil(root / "broken", config("whole"), None, world)
        errors_of_the_first(world)
        mesh = init_device_mesh("cpu", (1, 1, 2), mesh_dim_names=("data", "ring", "ulysses"))
        split = World(world.rank, world.size, 2, mesh, world.checkpoints)
        distil(root / "split", config("split"), None, split)


def interrupted(root: Path, config: DistillConfig, world: World) -> None:
    """A signal comes to the second process alone, and both end with one checkpoint."""
    drawn = []

    def draw_mask(*arguments):
        drawn.append(arguments)
        if world.rank == 1 and len(drawn) == 3:
            signal.raise_signal(signal.SIGTERM)
        return usual(*arguments)

    usual = pruning.draw_mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "draw_mask", draw_mask)
        with pytest.raises(Interrupted):
            distil(root / "broken", config, None, world)
    assert len(drawn) == 4  # the update is finished, of two losses
    with world.first_alone():
        if world.is_first:
            shutil.copytree(root / "broken", root / "broken-for-one")


def killed_before_its_report(root: Path, config: DistillConfig, world: World) -> None:
    """All stages are done: what is left needs the teacher's videos, which are not kept."""
    with world.first_alone():
        if world.is_first:
            shutil.rmtree(root / "experts" / "student")
            (root / "experts" / "report.md").unlink()
    distil(root / "experts", config, None, world)


def errors_of_the_first(world: World) -> None:
    """What the first process finds wrong ends all of them the same way."""
    with pytest.raises(ConfigError, match="only the first"):
        with world.first_alone():
            if world.is_first:
                raise ConfigError("only the first")
            pytest.fail("the second went on")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
