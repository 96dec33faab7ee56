"""Which models a worker has loaded: those of MODEL at start, then whatever is released, without a pause.

Once a second the worker looks which student is to be active. One that it does not have is fetched, loaded, compared
with PyTorch and warmed up beside the one that serves; then one assignment has the next job run on it. What fails on the
way leaves the worker as it was: it says so in its heartbeat, and tries again, later each time.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from redis.exceptions import RedisError

from distill.student import FolderError, card_path, parse_card
from worker import release
from worker.contract import Staging
from worker.engine import memory
from worker.engine.base import Made
from worker.gpu_worker import Pulse
from worker.jobs import Loaded, Runtime
from worker.pipeline import VideoPipeline
from worker.records import publish_models
from worker.releases import Releases, State
from worker.storage import Storage

log = logging.getLogger(__name__)

_LOOK_S = 1.0
_AGAIN_S, _AGAIN_MAX_S = 5.0, 300.0
"""Until a student that could not be loaded is tried again: at first, and at most."""


@dataclass(frozen=True)
class Places:
    """Where models are found."""

    models: Sequence[Path]
    """The folders of MODEL: what is served while nothing was released, and what stays beside it."""
    storage: Storage
    students: Path
    """For those that are fetched from the storage."""


class Stager(threading.Thread):
    """Has the models loaded that the releases want."""

    def __init__(
        self, releases: Releases, places: Places, load: Callable[[Path], VideoPipeline], *, keep_previous: bool
    ) -> None:
        """
        Args:
            releases: says what is to be served.
            places: where models are found.
            load: makes a folder's pipeline, warm. Raises ``FolderError``, ``EngineError``.
            keep_previous: whether the student that was active before stays loaded.
        """
        super().__init__(name="staging", daemon=True)
        self._releases = releases
        self._places = places
        self._load = load
        self._keep_previous = keep_previous
        self._staging: Staging | None = None
        self._told: tuple[Loaded, Staging | None] | None = None
        self._number = 0
        self._failures: dict[str, tuple[float, float]] = {}
        """By sha256: when it is tried again, and how long was waited for that."""
        self._published: set[str] = set()
        self._dropped: list[weakref.ref[VideoPipeline]] = []

    def begin(self) -> Loaded:
        """The models to start with. Where the released student cannot be had, the first of MODEL serves.

        Raises:
            FolderError, EngineError: there is something wrong with MODEL.
        """
        folders = self._places.models
        cards = [parse_card(card_path(folder)) for folder in folders]
        for number, card in enumerate(cards):
            if card.name in (other.name for other in cards[:number]):
                raise FolderError(f"MODEL={folders[number]}: another of these models is called {card.name} too")
        started, state = time.monotonic(), self._releases.state()
        self._number = state.number
        active = self._stage(state.active, self._show) if state.active else None
        if active:
            self._show(_loaded(active, active.choice.made, started))
        loaded = Loaded(active or self._load(folders[0]))
        for folder, card in zip(folders[1:], cards[1:], strict=True):
            loaded = replace(loaded, fixed=(*loaded.fixed, loaded.find(card.sha256) or self._load(folder)))
        previous = self._stage_previous(loaded, state)
        return replace(loaded, previous=previous)

    def follow(self, runtime: Runtime, pulse: Pulse) -> None:
        """From now on, keep ``runtime.loaded`` as the releases want it, and tell everybody."""
        self._runtime, self._pulse = runtime, pulse
        self._tell()
        self.start()

    def run(self) -> None:
        """Whatever goes wrong must not end it."""
        while True:
            time.sleep(_LOOK_S)
            try:
                self._look()
            except RedisError as error:
                log.debug("not known what is to be served: %s", error)
            except Exception:
                log.exception("staging")

    def _look(self) -> None:
        state, loaded = self._releases.state(), self._runtime.loaded
        if state.number != self._number:
            self._number, self._failures = state.number, {}
        if state.active is not None:
            if loaded.previous and loaded.previous.card.sha256 not in (state.active, state.previous):
                loaded = self._replace(replace(loaded, previous=None))  # first: three need not fit
                self._tell()
                self._free()
            if loaded.active.card.sha256 != state.active:
                self._activate(loaded, state)
            elif self._staging is None or self._staging.state != "loaded" or self._staging.wanted != state.active:
                self._staging = _loaded(loaded.active, "loaded", time.monotonic())  # rolled back before it was left
            elif previous := self._stage_previous(loaded, state):
                self._replace(replace(loaded, previous=previous))
        self._tell()
        self._free()

    def _activate(self, loaded: Loaded, state: State) -> None:
        assert state.active is not None
        started = time.monotonic()
        made: Made = "loaded"
        if (found := loaded.find(state.active)) is None:
            if (found := self._stage(state.active, self._say)) is None:
                return
            made = found.choice.made
        self._publish(loaded.active)
        self._replace(replace(loaded, active=found, previous=loaded.active if self._keep_previous else None))
        self._staging = _loaded(found, made, started)
        log.info("release %d: %s serves (%s)", state.number, found.model_card.id, self._staging.how)

    def _stage_previous(self, loaded: Loaded, state: State) -> VideoPipeline | None:
        """The student that was active before, where it is wanted and not there."""
        if not self._keep_previous or state.previous is None or loaded.find(state.previous):
            return None
        return self._stage(state.previous, lambda _staging: None)

    def _stage(self, sha256: str, say: Callable[[Staging], None]) -> VideoPipeline | None:
        """A student, ready to serve; None where that failed, or has failed and it is not yet time to try again."""
        again_at, waited = self._failures.get(sha256, (0.0, _AGAIN_S / 2))
        if time.monotonic() < again_at:
            return None
        say(Staging(wanted=sha256, state="staging"))
        try:
            places = self._places
            return self._load(release.locate(sha256, places.models, places.storage, places.students))
        except Exception as error:  # of a folder, the storage, an engine, or a lack of memory
            said = str(error).partition("\n")[0] or type(error).__name__
            if sha256 not in self._failures:
                log.warning("student %s cannot be served: %s", sha256[:12], said)
            wait = min(2 * waited, _AGAIN_MAX_S)
            self._failures[sha256] = (time.monotonic() + wait, wait)
        memory.free()
        say(Staging(wanted=sha256, state="failed", message=said))
        return None

    def _show(self, staging: Staging) -> None:
        self._staging = staging

    def _say(self, staging: Staging) -> None:
        self._staging = staging
        self._tell()

    def _replace(self, loaded: Loaded) -> Loaded:
        """The next job finds these."""
        left = [one for one in self._runtime.loaded.pipelines if loaded.find(one.card.sha256) is not one]
        self._dropped += map(weakref.ref, left)
        self._runtime.loaded = loaded
        return loaded

    def _publish(self, leaving: VideoPipeline) -> None:
        """Have a model of this machine in the storage, so that every worker can go back to it."""
        sha256 = leaving.card.sha256
        for folder in self._places.models:
            if sha256 not in self._published and parse_card(card_path(folder)).sha256 == sha256:
                try:
                    release.publish(self._places.storage, folder)
                    self._published.add(sha256)
                except (FolderError, OSError) as error:
                    log.warning("%s is not in the storage, so other workers may not go back to it: %s", folder, error)

    def _tell(self) -> None:
        """What is loaded, to whoever asks for it; only if it is news. Raises ``RedisError``."""
        loaded, staging = self._runtime.loaded, self._staging
        if self._told == (loaded, staging):
            return
        cards, active = [pipeline.model_card for pipeline in loaded.pipelines], loaded.active
        publish_models(self._runtime.records.redis, cards)
        self._releases.register(release.student_of(active.card, by=self._runtime.name))
        self._pulse.show(
            model=active.card.name,
            model_sha256=active.card.sha256,
            models=tuple(card.id for card in cards),
            engine=active.choice.name,
            engine_reason=active.choice.reason,
            release=staging,
        )
        self._told = loaded, staging

    def _free(self) -> None:
        """Give back the memory of what was dropped, once the last job on it is over."""
        still = [ref for ref in self._dropped if ref() is not None]
        if len(still) < len(self._dropped):
            memory.free()
        self._dropped = still


def _loaded(pipeline: VideoPipeline, how: Made, since: float) -> Staging:
    seconds = round(time.monotonic() - since, 3)
    return Staging(wanted=pipeline.card.sha256, state="loaded", how=how, seconds=seconds)
