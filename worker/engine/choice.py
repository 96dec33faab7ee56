"""Which engine runs a model here: the one asked for, or the fastest that works, with the reason for what does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from distill import backbones
from distill.backbones.base import Backbone
from distill.student import Card, weights_sha256
from worker.engine import cache, decoders
from worker.engine.base import Engine, Made
from worker.engine.batching import BatchingEngine
from worker.engine.eager import EagerEngine, GraphedEngine
from worker.engine.errors import EngineError
from worker.engine.memory import Casting, Offload
from worker.engine.parallel import ParallelEngine

log = logging.getLogger(__name__)

EngineKind = Literal["auto", "eager", "ort", "trt"]

GRAPH = "graph.onnx"
_PARITY = 1e-4
"""Largest difference from PyTorch that an engine in full precision may show, as a share of the largest value."""


@dataclass(frozen=True)
class Wanted:
    """What the settings say."""

    engine: EngineKind
    compile: bool
    """Whether the eager engine compiles its blocks."""
    cuda_graphs: bool
    """Whether it records its work on the GPU and plays it back."""
    folder: Path
    """Where builds are kept."""
    devices: int
    """GPUs that share one video, each with a process of its own."""
    offload: Offload
    casting: Casting
    max_batch: int
    """Clips in one call of the engine."""
    decode_memory_bytes: int
    """What decoding may take at a time; above it a clip is decoded in pieces, and pieces in tiles."""

    @property
    def of_eager(self) -> list[str]:
        """The settings that only the eager engine knows, where they are not as usual."""
        settings: dict[str, object] = {"OFFLOAD": self.offload, "CASTING": self.casting, "DEVICES": self.devices}
        settings["CUDA_GRAPHS"] = "on" if self.cuda_graphs else "off"
        return [f"{name}={value}" for name, value in settings.items() if value not in ("none", "off", 1)]


def check_settings(wanted: Wanted) -> None:
    """Refuse what cannot be had together, before anything is loaded. Raises ``EngineError``."""
    moved = [text for text in wanted.of_eager if text.startswith(("OFFLOAD", "CASTING"))]
    together = {
        f"ENGINE={wanted.engine}": (wanted.engine not in ("auto", "eager"), wanted.of_eager),
        "COMPILE=on": (wanted.compile, moved),
        "CUDA_GRAPHS=on": (wanted.cuda_graphs, [t for t in wanted.of_eager if t.startswith(("OFFLOAD", "DEVICES"))]),
        f"MAX_BATCH={wanted.max_batch}": (wanted.max_batch > 1, [t for t in moved if t.startswith("OFFLOAD")]),
    }
    for setting, (is_set, others) in together.items():
        if is_set and others:
            raise EngineError(f"{setting} and {others[0]} cannot be had together; leave one of them out")


def check_experts(wanted: Wanted, others: int) -> None:
    """Refuse what a model of several experts cannot do. Raises ``EngineError``."""
    if others and wanted.max_batch > 1:
        # A clip waits for the others at one engine, and they for it at the other.
        raise EngineError(f"MAX_BATCH={wanted.max_batch}: the model is of two experts, set it to 1")


@dataclass(frozen=True)
class Choice:
    """What was chosen."""

    engine: Engine
    decoder: decoders.Decoder
    reason: str | None
    """Why it is not an engine that comes first, where that is so."""
    made: Made = "loaded"
    seconds: float = 0.0
    """That it took, with the comparison."""
    kind: EngineKind = "eager"

    @property
    def name(self) -> str:
        """For manifests and heartbeats."""
        return self.engine.name


@dataclass(frozen=True)
class Model:
    """What an engine is made from."""

    pipe: Any
    """The stock pipeline, its modules on their device."""
    folder: Path
    """Where it was read from."""
    card: Card
    backbone: Backbone
    inputs: dict[str, Tensor]
    """Of the transformer, in one real call."""
    latents_BCTHW: Tensor
    """Of the decoder."""
    threads: int
    component: str = "transformer"
    """Of the pipeline, which of two experts the engine is for."""

    @property
    def transformer(self) -> Any:
        """What the engine stands for."""
        return getattr(self.pipe, self.component)


def choose(model: Model, wanted: Wanted) -> Choice:
    """Make the engine, compared with PyTorch before anything is served.

    Raises:
        EngineError: the engine was asked for by its name, and it does not work here.
    """
    started = time.monotonic()
    choice = _choose(model, wanted)
    if wanted.max_batch > 1:
        choice = replace(choice, engine=BatchingEngine(choice.engine, wanted.max_batch))
    return replace(choice, seconds=time.monotonic() - started)


def choose_other(model: Model, component: str, wanted: Wanted, like: Choice) -> Engine:
    """The engine of the other expert, of the kind that the first one's is.

    Raises:
        EngineError: it does not work, though the first one's does.
    """
    kind: EngineKind = "eager" if wanted.of_eager else like.kind
    return _MAKERS[kind](replace(model, component=component), replace(wanted, engine=kind)).engine


def _choose(model: Model, wanted: Wanted) -> Choice:
    if wanted.engine != "auto":
        return _MAKERS[wanted.engine](model, wanted)
    if wanted.of_eager:
        return replace(_eager(model, wanted), reason=f"{', '.join(wanted.of_eager)} is for the eager engine")
    kind = "ort" if model.pipe.device.type == "cpu" else "trt"
    try:
        return _MAKERS[kind](model, wanted)
    except EngineError as error:
        log.warning("no %s engine: %s", kind, error)
        reason = f"{kind}: {error}"
    return replace(_eager(model, wanted), reason=reason)


def _eager(model: Model, wanted: Wanted) -> Choice:
    transformer = model.transformer
    if wanted.devices > 1:
        engine: Engine = ParallelEngine(
            transformer, model.folder / model.component, world_size=wanted.devices, threads=model.threads
        )
    else:
        engine = EagerEngine(transformer, compile_blocks=wanted.compile)
    if wanted.cuda_graphs:
        engine = GraphedEngine(engine)
    return Choice(engine, _decoder(model, wanted), None)


def _ort(model: Model, wanted: Wanted) -> Choice:
    if model.pipe.device.type != "cpu":
        raise EngineError(f"onnxruntime is for the CPU here, and the model is on {model.pipe.device.type}")
    try:
        from worker.engine import export, ort
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; pip install 'fastlightgen[worker]'") from None
    builds = cache.Cache(wanted.folder)
    made: dict[str, Made] = {}

    batch = {name: (0,) for name in model.inputs} if wanted.max_batch > 1 else {}

    def graph(part: str, module: Any, inputs: dict[str, Tensor], axes: Mapping[str, tuple[int, ...]]) -> Path:
        """The module's graph with its own weights. Another student's graph is not exported anew if it is the same."""
        config, own = {
            "transformer": (model.transformer.config, model.component),
            "decoder": (model.pipe.vae.config, "vae"),
        }[part]
        # Two backbones may make different graphs of one configuration.
        read = {**graph_read(config, inputs, axes), "backbone": model.card.backbone}
        weights = {name: sha256 for name, sha256 in model.card.files.items() if name.startswith(f"{own}/")}
        about = {
            "engine": "ort",
            "part": part,
            "model": model.card.name,
            "model_sha256": model.card.sha256,
            "weights_sha256": weights_sha256(model.card.files, own),
            "versions": read["versions"],
        }

        def export_it(folder: Path) -> None:
            made[part] = "build"
            export.export(module, inputs, folder / GRAPH, axes)

        def fill(folder: Path) -> None:
            made[part] = "refit"
            exported = builds.get(cache.key_of(part=part, **read), export_it, about)
            export.with_weights(exported / GRAPH, module.state_dict(), folder / GRAPH)

        return builds.get(cache.key_of(part=part, weights=weights, **read), fill, about) / GRAPH

    pipe = model.pipe
    with model.backbone.exporting(model.transformer):
        path = graph("transformer", model.transformer, model.inputs, batch)
    engine = ort.OrtEngine(path, model.transformer.config, model.threads)
    check_parity(engine, EagerEngine(model.transformer), model.inputs)
    if model.component != "transformer":  # the clip's decoder is chosen with the first expert
        return Choice(engine, _decoder(model, wanted), None, made.get("transformer", "loaded"), kind="ort")

    def run_whole() -> Callable[..., Tensor]:
        whole = model.backbone.WholeDecoder(pipe.vae)
        inputs = {"latents": model.latents_BCTHW}
        run = ort.Session(graph("decoder", whole, inputs, {}), model.threads)
        _compare("the decoder", run(**inputs), whole(**inputs)[0])
        return run

    return Choice(
        engine, _decoder(model, wanted, run_whole, "ort"), None, made.get("transformer", "loaded"), kind="ort"
    )


def _trt(model: Model, wanted: Wanted) -> Choice:
    if model.pipe.device.type != "cuda":
        raise EngineError("TensorRT needs an NVIDIA GPU, and the model is on the CPU")
    from worker.engine import trt

    # Beside one clip at a time, which is what was recorded.
    together = {name: (wanted.max_batch, *value.shape[1:]) for name, value in model.inputs.items()}
    engine = trt.make(model, cache.Cache(wanted.folder), [together] if wanted.max_batch > 1 else [])
    return Choice(engine, _decoder(model, wanted), None, engine.made, kind="trt")


_MAKERS: dict[str, Callable[[Model, Wanted], Choice]] = {"eager": _eager, "ort": _ort, "trt": _trt}


def check_parity(engine: Engine, reference: Engine, inputs: dict[str, Tensor], tolerance: float = _PARITY) -> None:
    """One call of both. Raises ``EngineError`` where they differ by more than ``tolerance`` of the largest value."""
    _compare(engine.name, engine.infer(inputs), reference.infer(inputs), tolerance)


def _compare(what: str, got: Tensor, wanted: Tensor, tolerance: float = _PARITY) -> None:
    error = ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
    if not error <= tolerance:  # also where it is NaN
        raise EngineError(
            f"{what} differs from PyTorch by {error:.2g} of the largest value; {tolerance:.2g} is allowed"
        )


def _decoder(
    model: Model, wanted: Wanted, run_whole: Callable[[], Callable[..., Tensor]] | None = None, name: str = "eager"
) -> decoders.Decoder:
    """The fastest decoder that stays within the memory: ``run_whole`` makes an engine's, else PyTorch's."""
    vae, video = model.pipe.vae, model.card.video

    def fits(num_frames: int) -> bool:
        return model.backbone.decode_bytes(vae, num_frames, video.height, video.width) <= wanted.decode_memory_bytes

    # The whole clip's way through the modules would go past what brings offloaded weights.
    if wanted.offload == "none" and fits(video.num_frames):
        run = run_whole() if run_whole else model.backbone.WholeDecoder(vae)
        return decoders.WholeDecoder(run, f"whole-{name}")
    piece = model.backbone.FRAMES_IN_A_PIECE or video.num_frames
    kind = decoders.PieceDecoder if fits(piece) else decoders.TiledDecoder
    return kind(model.backbone, vae)


def graph_read(config: Any, inputs: Mapping[str, Tensor], axes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What an export reads of a module but for its weights, to be hashed with ``cache.key_of``."""
    sources = Path(backbones.__path__[0]).glob("*.py")
    return {
        # Names with an underscore say where it was read from, and what by.
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "axes": dict(axes),
        "inputs": {name: [list(value.shape), str(value.dtype)] for name, value in inputs.items()},
        "source": cache.source_sha256(*sources, Path(__file__).with_name("export.py")),
        "versions": {name: version(name) for name in ("torch", "diffusers", "onnx", "onnxscript")},
    }
