"""The settings of worker and trainer, read from the environment once, at start. Bad values are refused there."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from worker.connection import parse, redacted
from worker.gpu_lock import Window

MODELS_DIR = Path(__file__).resolve().parent.parent / "models"


class QueueSettings(BaseSettings):
    """Each field is the environment variable of the same name in capitals."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore")

    redis_url: str = "redis://127.0.0.1:6379/0"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    lease_s: int = Field(default=60, ge=4)
    """A job whose worker has been silent for so long is given to another."""
    gpu_name: str = "auto"
    """What those who share a GPU all call it. auto: its UUID, or the machine's name."""

    @field_validator("redis_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parse(value)
        return value


class Settings(QueueSettings):
    """The worker's."""

    storage_url: str = "var/storage"
    model: Annotated[tuple[Path, ...], NoDecode] = (Path("shapes-4step"),)
    """Folders under `models/`, or paths to them, between commas. The first answers when a request names none, until a
    student is released: then that one does, in its place."""
    students: Path = Path("var/students")
    """Where released students are kept that were fetched from the storage."""
    keep_previous: bool = True
    """Whether the student that was active before stays loaded: for requests that name it, and to be back at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    torch_threads: int = Field(default=os.cpu_count() or 1, ge=1)
    engine: Literal["auto", "eager", "ort", "trt"] = "auto"
    """What runs the transformer. auto: TensorRT on a GPU, onnxruntime on a CPU; PyTorch where that does not work."""
    engines: Path = Path("var/engines")
    """Where engines are kept once they are built."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether PyTorch compiles the blocks. auto: on a GPU."""
    cuda_graphs: bool = False
    """Whether PyTorch records its work on the GPU and plays it back: for models that are small for their GPU."""
    offload: Literal["none", "group"] = "none"
    """group: weights wait in the host's memory and come to the GPU block by block."""
    casting: Literal["none", "fp8"] = "none"
    """fp8: the transformer's matrices take a byte for each weight; its output is another one then."""
    devices: int = Field(default=1, ge=1)
    """GPUs that share one video."""
    max_batch: int = Field(default=1, ge=1)
    """Clips that are denoised at a time. Above 1 a clip's bytes depend on what it was denoised with."""
    overlap: bool = True
    """Whether a clip is decoded and saved while the next one is denoised."""
    decode_memory_mb: int = Field(default=4096, ge=1)
    """What decoding may take; above it a clip is decoded in pieces, and pieces in tiles."""
    text_cache_mb: int = Field(default=64, ge=0)
    """How much of what sentences were encoded to is kept."""
    canary_s: int = Field(default=600, ge=0)
    """How often a worker that has nothing to do makes the clip of its warm-up and compares it with the first one.
    0: never."""
    hang_s: int = Field(default=300, ge=0, validate_default=True)
    """A worker that does nothing at all for so long, or a job that has not ended so long after its time limit, has
    hung: the process is ended. 0: never."""
    drain_s: int = Field(default=50, ge=1)
    """What jobs in flight may take to finish after SIGTERM; then they go back to the queue. Ten seconds less than what
    whoever stops the worker gives it."""
    gpu_lock: bool = False
    """Whether it leaves the GPU to training that wants it for itself (TRAIN_POLICY=window), and waits meanwhile."""

    @field_validator("hang_s")
    @classmethod
    def _is_long_enough(cls, value: int, info: ValidationInfo) -> int:
        # A beat comes four times in a lease, and takes as long as Redis is tried.
        least = max(60, info.data.get("lease_s", 0))
        if 0 < value < least:
            raise ValueError(f"a worker that is well may be silent for that long; wanted {least} or more, or 0: never")
        return value

    @field_validator("model", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _find_models(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        if not value:
            raise ValueError("MODEL is empty; wanted the name of at least one model folder")
        return tuple(map(_find_model, value))


def _find_model(named: Path) -> Path:
    for folder in (named, MODELS_DIR / named):
        if (folder / "model_index.json").is_file():
            return folder
    raise ValueError(
        f"MODEL={named} is no model folder: there is no {named}/model_index.json here or under {MODELS_DIR.name}/"
    )


class TrainerSettings(QueueSettings):
    """The trainer's."""

    runs: Path = Path("var/runs")
    """Where each distillation has its folder."""
    storage_url: str = "var/storage"
    """Where its pictures and its student go."""
    students: Path = Path("var/students")
    """Where students are kept that were fetched from there."""
    teachers: Annotated[tuple[Path, ...], NoDecode] = ()
    """Folders under `models/`, or paths to them, between commas; none: every teacher there."""
    gate_against: Path = Path("shapes-4step")
    """What a student is held against while no worker has ever served one."""
    train_processes: int = Field(default=1, ge=1)
    """That share a run: one for each GPU."""
    train_policy: Literal["share", "serve-first", "window"] = "share"
    """When training runs; see `worker.gpu_lock`."""
    idle_s: int = Field(default=60, ge=1)
    """serve-first: how long nobody may have waited for a video."""
    train_window: Annotated[Window | None, NoDecode] = Field(default=None, validate_default=True)
    """window: `22:00-06:00`, in this machine's time."""

    @field_validator("teachers", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("train_window", mode="before")
    @classmethod
    def _parse_window(cls, value: object, info: ValidationInfo) -> object:
        if value is None and info.data.get("train_policy") == "window":
            raise ValueError("TRAIN_POLICY=window needs one, for example 22:00-06:00")
        return Window.parse(value) if isinstance(value, str) else value


SettingsT = TypeVar("SettingsT", bound=QueueSettings)


def read(kind: type[SettingsT]) -> SettingsT:
    """The settings of one program; ends it with exit code 2 and a line for each value that is wrong."""
    try:
        return kind()
    except ValidationError as error:
        for problem in error.errors():
            name = ".".join(str(part) for part in problem["loc"]).upper()
            sys.stderr.write(f"error: {name}={redacted(str(problem['input']))}: {problem['msg']}\n")
        raise SystemExit(2) from None
