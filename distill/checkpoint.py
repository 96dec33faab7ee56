"""Checkpoints of a training, by torch.distributed.checkpoint: written by any number of processes, read by any other.

A folder for each stage, in it one for each checkpoint, named by its step. `.metadata` is written last: a folder without
it was being written when the process ended, and does not count.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from distill.distributed import World, local

PROGRESS = "progress.json"
COMPLETE = ".metadata"


class Checkpoints:
    """Of one stage. Several processes go on training while one is written."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder = folder
        self._world = world
        self._writing: tuple[Any, int] | None = None

    @property
    def latest(self) -> Path | None:
        """The last one that was finished, as the first process sees it."""
        found = [path.parent for path in self.folder.glob(f"*/{COMPLETE}")]
        last = self._world.said_by_first(max(found, key=lambda path: int(path.name), default=None))
        if last is not None:
            self._world.wait_for(last / COMPLETE, last / PROGRESS)
        return last

    def save(self, step: int, tensors: Mapping[str, Tensor], progress: dict[str, Any]) -> int | None:
        """Begin to write one; returns the step of one that this finished.

        Args:
            tensors: by any names, whole or in parts.
            progress: what else is to be remembered, as JSON has it.
        """
        done = self.finish()
        path = self.folder / f"{step:06d}"
        if self._world.is_first:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            (path / PROGRESS).write_text(json.dumps(progress))
        writer = FileSystemWriter(path, overwrite=True)
        if self._world.is_sharded:
            self._world.gathered(None)  # the folder is there
            future = async_save(dict(tensors), storage_writer=writer, process_group=self._world.checkpoints)
            self._writing = future, step
            return done
        with _as_one_process():
            save(dict(tensors), storage_writer=writer, no_dist=True)
        self._remove_others(path)
        return step

    def finish(self) -> int | None:
        """Wait for the one that is being written; returns its step."""
        if self._writing is None:
            return None
        future, step = self._writing
        future.result()
        self._writing = None
        self._world.gathered(None)
        self._remove_others(self.folder / f"{step:06d}")
        self._world.gathered(None)  # none ends, and has the others ended, before that is done
        return step

    def load(self, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and progress of the last one, or None where there is none.

        Args:
            like: what a tensor of its shape lies in parts as, by the part of its name before the first ``|``.
        """
        if (path := self.latest) is None:
            return None
        kinds = FileSystemReader(path).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for name, kind in kinds.items():
            of, stored = like[name.partition("|")[0]], cast(TensorStorageMetadata, kind)
            if of.shape == stored.size:
                tensors[name] = torch.zeros_like(of, dtype=stored.properties.dtype)
            else:  # a count of steps
                tensors[name] = torch.zeros(stored.size, dtype=stored.properties.dtype, device=local(of).device)
        reader, alone = FileSystemReader(path), not self._world.is_sharded
        with _as_one_process():
            load(cast(dict[str, Any], tensors), storage_reader=reader, no_dist=alone)
        return tensors, json.loads((path / PROGRESS).read_text())

    def remove(self) -> None:
        """All of them."""
        self.finish()
        if self._world.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_others(self, kept: Path) -> None:
        if self._world.is_first:
            for path in self.folder.iterdir():
                if path != kept:
                    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _as_one_process() -> Iterator[None]:
    """That there is only one process is no cause for a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield
