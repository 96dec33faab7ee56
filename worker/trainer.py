"""`python -m worker.trainer`: takes distillations from the queue `train`, one at a time."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from redis import Redis
from rq import Worker

from distill import recipes
from distill.config import SHAPES
from distill.student import FolderError, card_path, parse_card
from worker import logs, training
from worker.contract import TRAIN_OFFER_KEY, TRAIN_QUEUE, Distillation, Named, Offer
from worker.gpu_lock import GpuLock, InWindow, ServeFirst, Share, Turns, name_of_gpu
from worker.queues import Leased, unique_name
from worker.records import Records, connect
from worker.settings import MODELS_DIR, TrainerSettings, read
from worker.storage import Storage, StorageError

log = logging.getLogger("trainer")

_GRACE_S = 30
_LOOK_S = 1.0


class Trainer(Leased, Worker):
    """rq's own worker, which forks for each job, renews its lease meanwhile, and would wait days for one to end."""

    def __init__(self, redis: Redis, name: str, lease_s: int, turns: Turns) -> None:
        super().__init__(redis, TRAIN_QUEUE, name, lease_s)
        self._turns = turns

    def check_for_suspension(self, burst: bool) -> None:
        """Before each job: wait while the queue is paused, and while it is not our turn on the GPU."""
        super().check_for_suspension(burst)
        while not self._stop_requested and not self.patiently(self._turns.may_begin):
            self.heartbeat()
            time.sleep(_LOOK_S)

    def handle_warm_shutdown_request(self) -> None:
        """Hand SIGTERM on to the job, which stops at a checkpoint and goes back to the queue."""
        if self.horse_pid:
            with suppress(ProcessLookupError):
                os.kill(self.horse_pid, signal.SIGTERM)


def main(command: Sequence[str] = training.COMMAND) -> int:
    """Run until SIGTERM. Exit code 2: a setting is wrong; 1: this process cannot go on, a new one may.

    Args:
        command: what `run` or `gate` and their arguments come after.
    """
    settings = read(TrainerSettings)
    logs.configure("trainer", settings.log_level, settings.log_format)
    try:
        storage = Storage(settings.storage_url)
        storage.check()
        teachers = find_teachers(settings.teachers)
    except (StorageError, FolderError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    name, redis = unique_name("trainer"), connect(settings.redis_url)
    gpu = name_of_gpu(settings.gpu_name)
    turns = _turns(settings, redis, gpu, name)
    runtime = training.Runtime(
        name=name,
        records=Records(redis, Distillation),
        storage=storage,
        turns=turns,
        runs=settings.runs.absolute(),
        teachers={teacher.name: folder for teacher, folder in teachers.items()},
        models=_model_folders(),
        gate_against=_found(settings.gate_against),
        students=settings.students.absolute(),
        command=command,
        processes=settings.train_processes,
        # When the trainer is killed, the run has ended before its lease does and another trainer may have it.
        grace_s=min(_GRACE_S, settings.lease_s / 2),
        pid=os.getpid(),
    )
    training.RUNTIME.set(runtime)
    offered = _offered()
    offer = Offer(
        recipes=offered,
        teachers=tuple(teachers),
        datasets=tuple(dict.fromkeys(recipes.dataset_of(recipes.load(name, [])) for name in offered)),
        policy=settings.train_policy,
        window=str(settings.train_window) if settings.train_window else None,
        gpu=gpu,
    )
    redis.set(TRAIN_OFFER_KEY, offer.model_dump_json())
    trainer = Trainer(connect(settings.redis_url, text=False), name, settings.lease_s, turns)
    trainer.work(logging_level="WARNING")
    return 0 if trainer.was_asked_to_stop else 1


def _offered() -> tuple[str, ...]:
    """Recipes whose clips are at hand."""
    data = {name: recipes.load(name, []).data for name in recipes.RECIPES}
    return tuple(name for name, of in data.items() if of == SHAPES or Path(of).is_dir())


def _turns(settings: TrainerSettings, redis: Redis, gpu: str, name: str) -> Turns:
    if settings.train_policy == "serve-first":
        return ServeFirst(redis, gpu, settings.idle_s)
    if settings.train_policy == "window":
        assert settings.train_window is not None  # the settings have seen to it
        return InWindow(redis, gpu, settings.train_window, GpuLock(redis, gpu, name, settings.lease_s))
    return Share()


def find_teachers(named: Sequence[Path]) -> dict[Named, Path]:
    """Teachers by name, with their folders: those that are named, or all under `models/`. Only their cards are read.

    Raises:
        FolderError: a folder that is named is no teacher's, or two are called the same.
    """
    found: dict[Named, Path] = {}
    for folder in map(_found, named) if named else _model_folders():
        try:
            card = parse_card(card_path(folder))
        except FolderError as error:
            if named:
                raise FolderError(f"TEACHERS: {folder} cannot be read: {error}") from None
            log.warning("%s is no teacher: %s", folder, error)
            continue
        if card.kind == "teacher":
            if card.name in {teacher.name for teacher in found}:
                raise FolderError(f"TEACHERS: two folders hold a teacher called {card.name}; name one of them")
            found[Named(name=card.name, sha256=card.sha256)] = folder
        elif named:
            raise FolderError(f"TEACHERS: {folder} is a {card.kind}; name the folder of a teacher")
    return found


def _model_folders() -> list[Path]:
    """Those that come with the program."""
    return sorted(path.parent for path in MODELS_DIR.glob("*/model_index.json"))


def _found(named: Path) -> Path:
    """A folder by its path, or by its name under `models/`."""
    return named.absolute() if named.exists() else MODELS_DIR / named


if __name__ == "__main__":
    raise SystemExit(main())
