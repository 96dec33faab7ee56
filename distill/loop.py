"""`fit()`: one training loop that knows no algorithm: optimiser, EMA, checkpoints, exact resume, logs.

A step's randomness depends on (seed, stage, step) alone, so a resumed run is the same run. Checkpoints are written
aside and renamed. SIGTERM or Ctrl-C write one and raise ``Interrupted``: the same command goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter

from distill import distributed
from distill.checkpoint import Checkpoints
from distill.config import Config, ConfigError, FitConfig, OptimiserConfig
from distill.distributed import ALONE, World, local


class Interrupted(Exception):
    """A signal ended the run early; a checkpoint has been written."""


class Run:
    """A run's folder and what it says while it goes: `events.jsonl` (append-only), TensorBoard, lines on stderr.

    Of several processes the first one says it.
    """

    def __init__(self, folder: Path, seed: int, world: World = ALONE) -> None:
        self.folder = folder
        self.seed = seed
        self.world = world
        self.stopping = False
        if world.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self._events = (folder / "events.jsonl").open("a", buffering=1)
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def event(self, stage: str, step: int, **values: Any) -> None:
        """Append one line to `events.jsonl`; numbers go to TensorBoard too."""
        if not self.world.is_first:
            return
        record = {"time": round(time.time(), 3), "stage": stage, "step": step, **values}
        self._events.write(json.dumps(record) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def say(self, line: str) -> None:
        """One line of progress for a person."""
        if not self.world.is_first:
            return
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The random numbers of one step."""
        mixed = zlib.crc32(f"{self.seed}/{stage}/{step}".encode())
        return torch.Generator().manual_seed(mixed)

    def _lock(self, file: IO[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            message = f"another process is at work in {self.folder}; wait for it or end it, or take another folder"
            raise ConfigError(message) from None

    def check_stop(self) -> None:
        """Between pieces of work that are short: raise if a signal has asked to stop, whichever process it came to."""
        if self.world.agreed(self.stopping):
            raise Interrupted

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a stop at the next step, and keep the folder to ourselves meanwhile.

        Raises:
            ConfigError: another process is at work in it.
        """

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.stopping = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            with ExitStack() as stack:
                with self.world.first_alone():
                    if self.world.is_first:
                        stack.enter_context(closing(self._board))
                        stack.enter_context(self._events)
                        self._lock(stack.enter_context((self.folder / "lock").open("w")))
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def remember(folder: Path, config: Config) -> None:
    """Write a run's configuration into its folder, or check that it is the one that the run was begun with.

    Raises:
        ConfigError: it is another one.
    """
    path = folder / "config.json"
    if path.exists():
        before = type(config).model_validate_json(path.read_text())
        if before != config:
            changed = [n for n, v in config.model_dump().items() if v != before.model_dump()[n]]
            raise ConfigError(
                f"{folder} was begun with other settings (they differ in: {', '.join(changed)}); "
                "give the same ones to go on, or another folder to begin anew"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, config.model_dump(mode="json"))


def write_json(path: Path, values: Any) -> None:
    """Indented, aside and renamed."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(aside, path)


def training_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory_mb() -> float:
    """The most that this process has held so far: of the GPU where it trains on one, else of the machine."""
    if training_device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, on a Mac bytes
    return held / (2**20 if sys.platform == "darwin" else 2**10)


def can_compile() -> bool:
    """Whether `torch.compile` works here: on a CPU it needs a C++ compiler."""
    return training_device().type != "cpu" or bool(shutil.which("g++") or shutil.which("c++"))


def compiled(run: Run, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through `torch.compile`, or as it is where that does not work."""
    if not can_compile():
        run.say("no C++ compiler (g++) found: training goes on uncompiled, at about half the speed")
        return function
    fast = torch.compile(function, dynamic=False)

    @wraps(function)
    def plainly(*arguments: Any) -> Any:
        with plain_attention():
            return fast(*arguments)

    return plainly


def compile_blocks(run: Run, blocks: nn.ModuleList) -> None:
    """Each of the blocks through `torch.compile`, in place: once for all, and any of them can be skipped."""
    if not can_compile():
        run.say("no C++ compiler (g++) found: training goes on uncompiled, at about half the speed")
        return
    # With and without gradients, adapters and a given batch: each is compiled for itself.
    torch._dynamo.config.recompile_limit = 64
    for block in blocks:
        # diffusers' attention over processes is not one that can be compiled: there the graph is broken.
        block.compile(fullgraph=run.world.context == 1, dynamic=False)


def plain_attention() -> AbstractContextManager[None]:
    """On a CPU, attention as plain matrix products: of short sequences the fused kernel's backward pass takes ten
    times as long."""
    if training_device().type != "cpu":
        return nullcontext()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name for CPUs too
    return sdpa_kernel(SDPBackend.MATH)


def computed_again(
    block: Callable[..., Any], *arguments: Any, attention: Callable[[], AbstractContextManager[Any]] = plain_attention
) -> Any:
    """A block's output, whose inner values are not kept for the way back but computed once more.

    ``attention``: how it is called; on the way back it has to be the same.
    """
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), attention()))


Loss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]
"""``(number of the batch, generator) -> (scalar, values to log)``; everything random comes from the generator."""


@dataclass(frozen=True)
class Rival:
    """Another network that is trained in the same loop: a critic."""

    name: str
    model: nn.Module
    loss: Loss
    config: OptimiserConfig
    updates: int
    """Before each update of the first network."""


class Diverged(RuntimeError):
    """Every look at the samples set off an alarm: there are no good weights to keep."""


class _Trained:
    """One network in the loop: what is trained of it, its optimisers and its running average."""

    def __init__(self, model: nn.Module, config: OptimiserConfig, parts: int = 1) -> None:
        """``parts``: of a clip's tokens, of which each process has the gradient of one."""
        self.config = config
        self._parts = parts
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimisers = _optimisers(model, list(self.parameters.values()), config)
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """By the parameter's name, and after a ``|`` what of it: weight, average, of which optimiser what."""
        found = {f"{name}|weight": p.detach() for name, p in self.parameters.items()}
        found |= {f"{name}|average": value for name, value in self.average.items()}
        for number, optimiser in enumerate(self.optimisers):
            for name, parameter in self.parameters.items():
                of = optimiser.state.get(parameter, {})
                found |= {f"{name}|optimiser {number}|{key}": value for key, value in of.items()}
        return found

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        for key, value in state.items():
            name, what, *which = key.split("|")
            if what == "weight":
                local(self.parameters[name].detach()).copy_(local(value))
            elif what == "average":
                local(self.average[name]).copy_(local(value))
            else:
                of = self.optimisers[int(what.removeprefix("optimiser "))]
                of.state[self.parameters[name]][which[0]] = value

    @torch.no_grad()
    def set_weights(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            local(parameter).copy_(local(weights[name]))

    def update(self, stage: str, step: int, steps: int, losses: Sequence[Callable[[], Tensor]]) -> tuple[float, float]:
        """One step of the optimisers on the mean of ``losses``; the mean and the norm of the gradient."""
        learning_rate = self.config.learning_rate * rate(step, steps, self.config)
        for optimiser in self.optimisers:
            # Another network's loss may have reached these weights.
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate
        mean = 0.0
        for loss in losses:
            value = loss() / len(losses)
            # Over all processes gradients are averaged, and those of the parts have to be added up.
            (value * self._parts).backward()
            mean += value.item()
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.config.clip_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{stage}: the gradient is not finite at step {step}; lower the learning rate")
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        # A short memory at first: the average should not remember the start.
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            averages, weights = ([local(t) for t in of.values()] for of in (self.average, self.parameters))
            torch._foreach_lerp_(averages, weights, 1 - decay)
        return mean, norm.item()


def fit(
    run: Run,
    stage: str,
    model: nn.Module,
    loss: Loss,
    config: FitConfig,
    sample: Callable[[Path], dict[str, float]],
    rivals: Sequence[Rival] = (),
    alarm: Callable[[dict[str, float]], str | None] = lambda _values: None,
    patience: int = 1,
    shadow: nn.Module | None = None,
) -> None:
    """Minimise ``loss`` over the trainable parameters of ``model``; on return the model holds the averaged weights.

    Args:
        run: where to write; ``run.folder / f"{stage}.safetensors"`` holds the finished weights, and where that file
            exists the stage is done: it is loaded and nothing is trained.
        stage: name of this optimisation within the run.
        model: trained in place.
        loss: see ``Loss``.
        config: see ``FitConfig``. A step is one update of ``model``.
        sample: draws what the averaged weights can do into the given PNG and returns values to log.
        rivals: networks that are updated before each step, each by its own loss. They are left as they end up.
        alarm: told what ``sample`` returned and the last logged means; says what is wrong, or None.
        patience: alarms in a row that end the stage, with the last weights that set off none.
        shadow: a copy of ``model`` that has the averaged weights throughout: a target for the loss.

    Raises:
        Interrupted: a signal came; the checkpoint holds every step done.
        FloatingPointError: a gradient is no longer finite.
        Diverged: the alarms came before there were any good weights.
    """
    finished = run.folder / f"{stage}.safetensors"
    checkpoints = Checkpoints(run.folder / f"{stage}.checkpoint", run.world)
    if run.world.exists(finished):
        distributed.load(model, finished)
        checkpoints.remove()  # of a run that was killed between the two
        return
    first = _Trained(model, config, run.world.context)
    others = {rival.name: _Trained(rival.model, rival.config, run.world.context) for rival in rivals}
    everyone = {"": first, **others}
    log = _Means(run.world)
    start, alarms, good_step = 0, 0, 0
    good: dict[str, Tensor] | None = None
    like = {f"{network}/{name}": p.detach() for network, of in everyone.items() for name, p in of.parameters.items()}
    if checkpoints.latest is not None:
        like |= {f"good/{name}": distributed.on_host(p, run.world) for name, p in first.parameters.items()}
    if (found := checkpoints.load(like)) is not None:
        tensors, progress = found
        for network, trained in everyone.items():
            trained.load(_within(f"{network}/", tensors))
        good = _within("good/", tensors) or None
        start, alarms, good_step = (progress[name] for name in ("step", "alarms", "good_step"))
        log.load(progress["log"])
        del tensors, found  # copies of all that was loaded: as much memory again as weights and averages take
        run.say(f"{stage}: resumed at step {start}")
    if shadow is not None:
        for name, parameter in shadow.named_parameters():
            parameter.data = first.average[name]  # which is changed in place

    def noted(step: int | None) -> None:
        if step is not None:
            run.event(stage, step, checkpoint=checkpoints.folder.name)

    def save(step: int) -> None:
        tensors = {f"{network}/{key}": t for network, of in everyone.items() for key, t in of.state().items()}
        tensors |= {f"good/{name}": value for name, value in (good or {}).items()}
        progress = {"step": step, "alarms": alarms, "good_step": good_step, "log": log.state()}
        noted(checkpoints.save(step, tensors, progress))

    for step in range(start, config.steps):
        for rival in rivals:
            for update in range(step * rival.updates, (step + 1) * rival.updates):
                losses = [
                    log.recording(rival.loss, number, run.generator(f"{stage}/{rival.name}", number), rival.name)
                    for number in range(update * config.accumulate, (update + 1) * config.accumulate)
                ]
                others[rival.name].update(f"{stage}, {rival.name}", step, config.steps, losses)
        losses = [
            log.recording(loss, number, run.generator(stage, number), "")
            for number in range(step * config.accumulate, (step + 1) * config.accumulate)
        ]
        value, norm = first.update(stage, step, config.steps, losses)
        log.add({"loss": value, "grad_norm": norm})

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            means, rate_hz = log.report()
            clips_per_s = rate_hz * config.batch * config.accumulate
            rates = {"steps_per_s": rate_hz, "clips_per_s": clips_per_s, "memory_mb": round(log.memory_mb, 1)}
            run.event(stage, done, steps=config.steps, **means, **rates)
            shown = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
            left_min = (config.steps - done) / rate_hz / 60
            run.say(f"{stage} {done}/{config.steps}  {shown}  {rate_hz:.2f} steps/s  {left_min:.1f} min left")
        wrong = None
        if done % config.sample_every == 0 or done == config.steps:
            with torch.no_grad(), _swapped(first.parameters, first.average):
                seen = sample(run.folder / "samples" / f"{stage}-{done:06d}.png")
            wrong = alarm({**log.last, **seen})
            run.event(stage, done, **seen, **({"alarm": wrong} if wrong else {}))
            alarms = alarms + 1 if wrong else 0
            if wrong:
                run.say(f"{stage}: alarm: {wrong}")
            else:
                # They are wanted at most once more.
                good = {name: distributed.on_host(value, run.world) for name, value in first.average.items()}
                good_step = done
            log.restart()
        if alarms >= patience or (wrong and done == config.steps):
            if good is None:
                raise Diverged(f"{stage}: {wrong}; lower the learning rate, or widen the limits")
            run.say(f"{stage}: ends at step {done} with the weights of step {good_step}, the last good ones")
            run.event(stage, good_step, ended="last good weights")
            break
        stopping = run.world.agreed(run.stopping)
        if done % config.checkpoint_every == 0 or stopping:
            save(done)
        if stopping:
            noted(checkpoints.finish())
            raise Interrupted

    assert good is not None  # the last step was looked at, and what was wrong with it would have been raised
    first.set_weights(good)
    distributed.save(model, finished, run.world)
    checkpoints.remove()


def _within(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class _Means:
    """Means of what is logged, over all processes, and the rate of steps, since the last report."""

    def __init__(self, world: World) -> None:
        self.last: dict[str, float] = {}
        self.memory_mb = 0.0
        """The most that a process has held so far."""
        self._world = world
        self._totals: dict[str, tuple[float, int]] = {}
        self.restart()
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to tell an alarm, and log, what this one would have."""
        return {"last": self.last, "totals": self._of_all(), "steps": self._steps}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the rate of the first report is then of what was done since."""
        self.last, self._steps = state["last"], state["steps"]
        if self._world.is_first:  # what all of them had, once
            self._totals = {name: (total, count) for name, (total, count) in state["totals"].items()}

    def restart(self) -> None:
        """Time that was spent on something else does not count."""
        self._since = time.monotonic()

    def recording(self, loss: Loss, number: int, generator: torch.Generator, prefix: str) -> Callable[[], Tensor]:
        """``loss`` of one batch, to be called; what it says is noted, under the name of whose loss it is."""

        def call() -> Tensor:
            value, values = loss(number, generator)
            self.add({f"{prefix}_{name}".lstrip("_"): v for name, v in values.items()})
            if prefix:
                self.add({f"{prefix}_loss": value.item()})
            return value

        return call

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            total, count = self._totals.get(name, (0.0, 0))
            self._totals[name] = total + value, count + 1
        self._steps += "loss" in values

    def report(self) -> tuple[dict[str, float], float]:
        """The means and the steps a second."""
        means = {name: total / count for name, (total, count) in self._of_all().items()}
        self.memory_mb = max(self._world.gathered(peak_memory_mb()))
        rate_hz = self._steps / max(time.monotonic() - self._since, 1e-9)
        self.last, self._totals, self._steps = means, {}, 0
        self.restart()
        return means, rate_hz

    def _of_all(self) -> dict[str, tuple[float, int]]:
        """The totals and counts of all processes, added up. Not all have the same names."""
        added: dict[str, tuple[float, int]] = {}
        for totals in self._world.gathered(self._totals):
            for name, (total, count) in totals.items():
                before, counted = added.get(name, (0.0, 0))
                added[name] = before + total, counted + count
        return added


def _optimisers(
    model: nn.Module, parameters: list[nn.Parameter], config: OptimiserConfig
) -> list[torch.optim.Optimizer]:
    """AdamW for all ``parameters`` of the model, or Muon (Jordan et al. 2024) for the matrices within its blocks.

    The rest is AdamW's then. Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so that one learning
    rate serves both.
    """
    matrices = set[Tensor]()
    if config.optimiser == "muon":
        matrices = {
            layer.weight
            for module in model.modules()
            if isinstance(module, nn.ModuleList)
            for layer in module.modules()
            if isinstance(layer, nn.Linear)
        }
    rest = [p for p in parameters if p not in matrices]
    adamw = torch.optim.AdamW(
        rest, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=True
    )
    if not matrices:
        return [adamw]
    muon = torch.optim.Muon(
        [p for p in parameters if p in matrices],
        lr=config.learning_rate,
        momentum=config.betas[1],
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adamw, muon]


def rate(step: int, steps: int, config: OptimiserConfig) -> float:
    """Learning rate over its peak at one of ``steps``: linear warm-up, then half a cosine down to .05."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    return 0.525 + 0.475 * float(torch.cos(torch.tensor(torch.pi * progress)))


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Give the parameters other values for the length of the block. They change places, so that it takes no memory."""

    def swap() -> None:
        for name, parameter in parameters.items():
            one, other = local(parameter.detach()), local(values[name])
            kept = one.clone()
            one.copy_(other)
            other.copy_(kept)

    swap()
    try:
        yield
    finally:
        swap()
