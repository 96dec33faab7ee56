"""`fit()`: one training loop that knows no algorithm: optimiser, EMA, checkpoints, exact resume, logs.

A step's randomness depends on (seed, stage, step) alone, so a resumed run is the same run. Checkpoints are written
aside and renamed. SIGTERM or Ctrl-C write one and raise ``Interrupted``: the same command goes on from there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.tensorboard import SummaryWriter

from distill.config import Config, ConfigError, FitConfig


class Interrupted(Exception):
    """A signal ended the run early; a checkpoint has been written."""


class Run:
    """A run's folder and what it says while it goes: `events.jsonl` (append-only), TensorBoard, lines on stderr."""

    def __init__(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.seed = seed
        self.stopping = False
        self._events = (folder / "events.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(folder / "tensorboard"))

    def event(self, stage: str, step: int, **values: Any) -> None:
        """Append one line to `events.jsonl`; numbers go to TensorBoard too."""
        record = {"time": round(time.time(), 3), "stage": stage, "step": step, **values}
        self._events.write(json.dumps(record) + "\n")
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def say(self, line: str) -> None:
        """One line of progress for a person."""
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def generator(self, stage: str, step: int) -> torch.Generator:
        """The random numbers of one step."""
        mixed = zlib.crc32(f"{self.seed}/{stage}/{step}".encode())
        return torch.Generator().manual_seed(mixed)

    def check_stop(self) -> None:
        """Between pieces of work that are short: raise if a signal has asked to stop."""
        if self.stopping:
            raise Interrupted

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into a stop at the next step."""

        def stop(_number: int, _frame: FrameType | None) -> None:
            self.stopping = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._board.close()
            self._events.close()


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
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")


def training_device() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def can_compile() -> bool:
    """Whether `torch.compile` works here: on a CPU it needs a C++ compiler."""
    return training_device().type != "cpu" or bool(shutil.which("g++") or shutil.which("c++"))


def compiled(run: Run, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through `torch.compile`, or as it is where that does not work."""
    if not can_compile():
        run.say("no C++ compiler (g++) found: training goes on uncompiled, at about half the speed")
        return function
    fast = torch.compile(function, dynamic=False)
    if training_device().type != "cpu":
        return fast

    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # despite its name for CPUs too

    @wraps(function)
    def on_cpu(*arguments: Any) -> Any:
        # Of short sequences the fused kernel's backward pass takes ten times as long as plain matrix products do.
        with sdpa_kernel(SDPBackend.MATH):
            return fast(*arguments)

    return on_cpu


def fit(
    run: Run,
    stage: str,
    model: nn.Module,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    config: FitConfig,
    sample: Callable[[Path], dict[str, float]],
) -> None:
    """Minimise ``loss`` over the trainable parameters of ``model``; on return the model holds the averaged weights.

    Args:
        run: where to write; ``run.folder / f"{stage}.safetensors"`` holds the finished weights, and where that file
            exists the stage is done: it is loaded and nothing is trained.
        stage: name of this optimisation within the run.
        model: trained in place.
        loss: ``(step, generator) -> (scalar, values to log)``; everything random comes from the generator.
        config: see ``FitConfig``.
        sample: draws what the averaged weights can do into the given PNG and returns values to log.

    Raises:
        Interrupted: a signal came; the checkpoint holds every step done.
        FloatingPointError: the loss is no longer finite.
    """
    finished = run.folder / f"{stage}.safetensors"
    checkpoint = run.folder / f"{stage}.checkpoint.pt"
    if finished.exists():
        load_model(model, finished)
        return
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimisers = _optimisers(model, list(parameters.values()), config)
    average = {name: p.detach().clone() for name, p in parameters.items()}
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=training_device())
        model.load_state_dict(state["model"])
        for optimiser, stored in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(stored)
        average, start = state["average"], state["step"]
        run.say(f"{stage}: resumed at step {start}")

    def save(step: int) -> None:
        stored = [optimiser.state_dict() for optimiser in optimisers]
        state = {"model": model.state_dict(), "optimisers": stored, "average": average, "step": step}
        aside = checkpoint.with_suffix(".tmp")
        torch.save(state, aside)
        os.replace(aside, checkpoint)

    logged_at, logged_step, totals = time.monotonic(), start, dict[str, float]()
    for step in range(start, config.steps):
        for group in (group for optimiser in optimisers for group in optimiser.param_groups):
            group["lr"] = config.learning_rate * rate(step, config)
        value, values = loss(step, run.generator(stage, step))
        value.backward()
        norm = nn.utils.clip_grad_norm_(list(parameters.values()), config.clip_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"{stage}: the gradient is not finite at step {step}; lower the learning rate")
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        # A short memory at first: the average should not remember the random start.
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)

        done = step + 1
        for name, number in {"loss": value.item(), "grad_norm": norm.item(), **values}.items():
            totals[name] = totals.get(name, 0.0) + number
        if done % config.log_every == 0 or done == config.steps:
            count = done - logged_step
            rate_hz = count / max(time.monotonic() - logged_at, 1e-9)
            means = {name: total / count for name, total in totals.items()}
            run.event(stage, done, **means, steps_per_s=rate_hz, clips_per_s=rate_hz * config.batch)
            shown = "  ".join(f"{name} {mean:.4g}" for name, mean in means.items())
            left_min = (config.steps - done) / rate_hz / 60
            run.say(f"{stage} {done}/{config.steps}  {shown}  {rate_hz:.2f} steps/s  {left_min:.1f} min left")
            logged_at, logged_step, totals = time.monotonic(), done, {}
        if done % config.checkpoint_every == 0 or run.stopping:
            save(done)
        if run.stopping:
            raise Interrupted
        if done % config.sample_every == 0 or done == config.steps:
            with _swapped(parameters, average), torch.no_grad():
                run.event(stage, done, **sample(run.folder / "samples" / f"{stage}-{done:06d}.png"))
            logged_at = time.monotonic()

    for name, parameter in parameters.items():
        parameter.data.copy_(average[name])
    aside = finished.with_suffix(".tmp")
    save_model(model, str(aside))
    os.replace(aside, finished)
    checkpoint.unlink(missing_ok=True)


def _optimisers(model: nn.Module, parameters: list[nn.Parameter], config: FitConfig) -> list[torch.optim.Optimizer]:
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


def rate(step: int, config: FitConfig) -> float:
    """Learning rate over its peak: linear warm-up, then half a cosine down to .05."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)
    return 0.525 + 0.475 * float(torch.cos(torch.tensor(torch.pi * progress)))


@contextmanager
def _swapped(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> Iterator[None]:
    """Give the parameters other values for the length of the block."""
    before = {name: parameter.data for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data = values[name]
    try:
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]
