"""The transformer as TensorRT runs it: ONNX into a plan, a plan into an engine, other weights into either.

One file for two modules with one interface: `tensorrt` on data-centre GPUs, and `tensorrt_rtx` on RTX GPUs, which also
builds plans on a machine without a GPU. To load a plan needs one, and to build one that takes other weights.

A plan takes minutes to build for a large model, so it is built once for a graph. Every parameter can be replaced in it
by its own name, and a re-distilled student with the same graph is put into the plan that is there.
"""

from __future__ import annotations

import copy
import importlib
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import onnx_ir
import torch
from onnx.helper import tensor_dtype_to_np_dtype
from torch import Tensor

from distill import student
from worker.engine import choice, export
from worker.engine.base import Engine, Made
from worker.engine.cache import Cache, key_of, source_sha256
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineError

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
"""Of the transformer's inputs by name, for one size of video."""

TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3}
"""Largest difference from PyTorch, as a share of the largest value. At least twice what rounding makes of the bundled
student's output (.013 in bf16, .0015 in fp16, whose mantissa TensorRT's fp32 has too: TF32). It shows a layer that is
wrong. It cannot show a lost bias (.002 to .06), so what can be refitted is compared by name as well."""

_PLAN = "model.plan"
_BUILT = "built.json"
_REPORT_EVERY_S = 10.0


@dataclass(frozen=True)
class Built:
    """What stands beside a plan."""

    refittable: bool
    weights_sha256: str
    """Of the weights that it was built with."""
    parameters: dict[str, list[Any]]
    """Type and shape by name, of all that can be refitted."""

    @classmethod
    def read(cls, folder: Path) -> Built:
        """Of the plan in ``folder``."""
        return cls(**json.loads((folder / _BUILT).read_text()))

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Whether the plan can take ``weights``. Raises ``EngineError`` that names what is missing or other."""
        if not self.refittable:
            raise EngineError("this plan was built without the possibility to put other weights in; build it anew")
        if missing := sorted(self.parameters.keys() - weights.keys()):
            raise EngineError(f"weights are missing for {_list(missing)}")
        if unknown := sorted(weights.keys() - self.parameters.keys()):
            raise EngineError(f"the plan has no weights {_list(unknown)}")
        for name, found in _parameters(weights).items():
            if found != self.parameters[name]:
                raise EngineError(f"{name} is {_text(found)}; the plan takes {_text(self.parameters[name])}")


@cache
def module() -> ModuleType:
    """`tensorrt`, or `tensorrt_rtx` where the first is not installed. Raises ``EngineError`` where none is."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if error.name != name:  # it is there, and something that it needs is not
                log.warning("%s cannot be used: %s", name, error)
    raise EngineError(
        "neither tensorrt nor tensorrt_rtx can be imported; "
        "pip install 'fastlightgen[gpu]' for a data-centre GPU, 'fastlightgen[rtx]' for an RTX GPU"
    )


# --- building --------------------------------------------------------------------------------------------------------


def build(
    path: Path,
    sizes: Sequence[Shapes],
    *,
    refittable: Mapping[str, Any] | None = None,
    limit_bytes: int | None = None,
    timing_cache: Path | None = None,
) -> memoryview:
    """A plan of an ONNX file: strongly typed, so what is fp16 in the file is fp16 in the engine.

    Args:
        path: of the ONNX file (`worker.engine.export`); weights beside it are found.
        sizes: that the engine has to take. With one of them the graph may be static. With several the axes that differ
            have to be dynamic in it; then everything between the smallest and the largest is taken, and kernels are
            chosen for the largest.
        refittable: the names of the weights that can be replaced in the plan; without it, none can. Needs a GPU.
        limit_bytes: what the engine may take of the GPU. Without it, what is free; nothing is checked without a GPU.
        timing_cache: a file that remembers how fast kernels are here; made if there is none.

    Raises:
        EngineError: it does not fit, the file cannot be read, it does not take these sizes, or it cannot be built.
    """
    trt = module()
    logger = _logger(trt)
    logger.said.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)) or not network.num_inputs:  # an empty file is no error to it
        # The first is the cause; operators that needed its result follow.
        reason = parser.get_error(0).desc() if parser.num_errors else logger.last()
        raise EngineError(f"{path.name} cannot be read by {trt.__name__} {trt.__version__}: {reason.strip()}")
    config = builder.create_builder_config()
    _add_profile(builder, network, config, sizes)
    _check_memory(path, _largest(sizes), limit_bytes)
    _allow_unfused_attention(trt, network)
    if refittable is not None:
        # One by one: REFIT would make every constant of the graph replaceable, which keeps them from being folded.
        config.set_flag(trt.BuilderFlag.REFIT_INDIVIDUAL)
        if unknown := [name for name in refittable if not network.mark_weights_refittable(name)]:
            raise EngineError(f"{path.name} has no weights {_list(unknown)}")
        if not torch.cuda.is_available():  # TensorRT would only say that a check of its own failed
            raise EngineError("a plan that takes other weights needs a GPU to build; without one, build a fixed plan")
    config.progress_monitor = monitor = _monitor(trt)
    # Without a GPU nothing is timed; in tensorrt_rtx nothing ever is.
    timed = timing_cache if trt.__name__ == "tensorrt" else None
    if timed:
        _read_timings(config, timed)
    started = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(f"{trt.__name__} {trt.__version__} cannot build {path.name}: {logger.last()}")
    if timed:
        _write_timings(config, timed)
    log.info("%s: built in %.0f s, %s", path.name, time.monotonic() - started, _gb(plan.nbytes))
    del monitor  # it has to live until here
    return memoryview(plan)


def profile(sizes: Sequence[Shapes]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The smallest, the best and the largest shape of each input. The best is that of the largest size."""
    best = _largest(sizes)

    def over(pick: Callable[..., int], name: str) -> tuple[int, ...]:
        return tuple(pick(lengths) for lengths in zip(*(size[name] for size in sizes), strict=True))

    return {name: (over(min, name), best[name], over(max, name)) for name in best}


def memory_bytes(path: Path, size: Shapes) -> tuple[int, int]:
    """About what an engine of an ONNX file takes of the GPU: for its weights, and for what it computes with.

    The second is the most that is alive at a time when the operators run in the order of the file. No operator is
    joined with the next one then, as the engine will; and attention keeps no scores, as in fused kernels.
    """
    graph = onnx.load(path, load_external_data=False).graph
    values = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    lengths: dict[str, int] = {}
    for value in graph.input:
        for dim, length in zip(value.type.tensor_type.shape.dim, size[value.name], strict=True):
            if dim.dim_param:
                lengths[dim.dim_param] = length

    @cache
    def length_of(text: str) -> int:  # as "s33*((s20//2))"
        length = onnx_ir.SymbolicDim(text).evaluate(lengths)
        assert isinstance(length, int)
        return length

    def bytes_of(name: str) -> int:
        if name not in values:  # a shape, or another handful of numbers
            return 0
        dims = (length_of(dim.dim_param) if dim.dim_param else dim.dim_value for dim in values[name].shape.dim)
        return math.prod(dims) * tensor_dtype_to_np_dtype(values[name].elem_type).itemsize

    weights = sum(
        math.prod(tensor.dims) * tensor_dtype_to_np_dtype(tensor.data_type).itemsize for tensor in graph.initializer
    )
    constant = {tensor.name for tensor in graph.initializer}
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    alive = most = sum(bytes_of(value.name) for value in graph.input)
    for i, node in enumerate(graph.node):
        alive += sum(map(bytes_of, node.output))
        most = max(most, alive)
        alive -= sum(bytes_of(name) for name in {*node.input} - constant if last_use[name] == i)
    return weights, most


def _check_memory(path: Path, size: Shapes, limit_bytes: int | None) -> None:
    if limit_bytes is None:
        if not torch.cuda.is_available():
            return
        limit_bytes = torch.cuda.mem_get_info()[0]
    weights, activations = memory_bytes(path, size)
    if weights + activations > limit_bytes:
        raise EngineError(
            f"the engine needs about {_gb(weights + activations)} of the GPU ({_gb(weights)} for weights, "
            f"{_gb(activations)} to compute with) and has {_gb(limit_bytes)}; use a smaller or shorter video, free the "
            "GPU of other processes, or set ENGINE=eager"
        )


def _add_profile(builder: Any, network: Any, config: Any, sizes: Sequence[Shapes]) -> None:
    """Check ``sizes`` against the graph's inputs, and tell the builder where they differ."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    wanted = profile(sizes)
    if inputs.keys() != wanted.keys():
        raise EngineError(f"the graph's inputs are {_list(sorted(inputs))}; shapes are of {_list(sorted(wanted))}")
    made = builder.create_optimization_profile()
    for name, shape in inputs.items():
        smallest, best, largest = wanted[name]
        fits = len(shape) == len(best) and all(
            length in (-1, low) and (length == -1 or low == high)
            for length, low, high in zip(shape, smallest, largest, strict=True)
        )
        if not fits:
            raise EngineError(
                f"{name} is wanted from {smallest} to {largest}, and in the graph it is {shape}; "
                "export it with the axes dynamic that differ"
            )
        made.set_shape(name, smallest, best, largest)
    if any(-1 in shape for shape in inputs.values()) and config.add_optimization_profile(made) < 0:
        raise EngineError(f"TensorRT does not take the shapes {wanted}: {_logger(module()).last()}")


def _allow_unfused_attention(trt: Any, network: Any) -> None:
    """Where there is no kernel for a head's width and type, several do it. Otherwise the build would end there."""
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _read_timings(config: Any, path: Path) -> None:
    kept = path.read_bytes() if path.exists() else b""
    if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
        log.warning("%s is of another machine or version; kernels are timed anew", path)
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _write_timings(config: Any, path: Path) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_bytes(memoryview(config.get_timing_cache().serialize()))
    os.replace(aside, path)


def _largest(sizes: Sequence[Shapes]) -> Shapes:
    return max(sizes, key=lambda size: sum(map(math.prod, size.values())))


# --- running ---------------------------------------------------------------------------------------------------------


class TrtEngine(Engine):
    """A plan on the GPU. One call at a time."""

    made: Made

    def __init__(
        self,
        folder: Path,
        config: Any,
        dtype: torch.dtype,
        device: torch.device,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Load a plan.

        Args:
            folder: of the plan and what stands beside it, see ``write``.
            config: of the transformer that it was built from.
            dtype: of the hidden states that it takes.
            device: a GPU.
            weights: to be put in; without them it has those that it was built with.

        Raises:
            EngineError: it cannot be loaded on this GPU, or it cannot take these weights.
        """
        super().__init__(config, dtype, device)
        self.name = f"{module().__name__.replace('tensorrt', 'trt').replace('_', '-')}-cuda"
        self._folder = folder
        # TensorRT waits for the whole GPU around each call on the default stream.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._engine, self._context = self._load(weights)

    def _load(self, weights: Mapping[str, Tensor] | None) -> tuple[Any, Any]:
        trt = module()
        logger = _logger(trt)
        built = Built.read(self._folder)
        if weights is not None:
            built.check(weights)
        with torch.cuda.device(self.device):
            logger.said.clear()
            engine = trt.Runtime(logger).deserialize_cuda_engine((self._folder / _PLAN).read_bytes())
            if engine is None:
                raise EngineError(
                    f"{trt.__name__} {trt.__version__} cannot load its plan on {torch.cuda.get_device_name()}: "
                    f"{logger.last()}; tensorrt is for data-centre GPUs, tensorrt_rtx for RTX GPUs"
                )
            if built.refittable:
                # TensorRT 11.3 may drop a bias from a refittable plan, and then does not list it.
                refitter = trt.Refitter(engine, logger)
                if lost := sorted(built.parameters.keys() - set(refitter.get_all_weights())):
                    raise EngineError(f"the plan does not take weights for {_list(lost)}")
                if weights is not None:
                    refit(refitter, weights)
            context = engine.create_execution_context()
            if context is None:
                free, _ = torch.cuda.mem_get_info()
                raise EngineError(
                    f"the engine needs {_gb(engine.get_device_memory_size_for_profile_v2(0))} of the GPU to compute "
                    f"with, and {_gb(free)} are free: {logger.last()}; use a smaller or shorter video, or ENGINE=eager"
                )
        return engine, context

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``. Raises ``EngineError`` for inputs that the plan was not built for."""
        engine, context = self._engine, self._context
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        if {*inputs, export.OUTPUT} != set(names):
            raise EngineError(f"the plan's tensors are {_list(sorted(names))}; the inputs are {_list(sorted(inputs))}")
        with torch.cuda.device(self.device):
            # Tensors may be freed when this returns: what uses their memory next waits for the engine, see below.
            given = {name: value.contiguous() for name, value in inputs.items()}
            for name, value in given.items():
                wanted = _torch_type(engine.get_tensor_dtype(name))
                if value.dtype != wanted or value.device != self.device:
                    raise EngineError(f"{name} is {value.dtype} on {value.device}; want {wanted} on {self.device}")
                if not context.set_input_shape(name, tuple(value.shape)):
                    low, _, high = map(tuple, engine.get_tensor_profile_shape(name, 0))
                    raise EngineError(f"{name} is {tuple(value.shape)}; this plan takes {low} to {high}")
                context.set_tensor_address(name, value.data_ptr())
            shape = tuple(context.get_tensor_shape(export.OUTPUT))
            if min(shape, default=0) < 0:
                shapes = {name: tuple(value.shape) for name, value in given.items()}
                raise EngineError(f"the inputs' shapes do not go together: {shapes}")
            output = torch.empty(shape, dtype=_torch_type(engine.get_tensor_dtype(export.OUTPUT)), device=self.device)
            context.set_tensor_address(export.OUTPUT, output.data_ptr())
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError(f"TensorRT could not run: {_logger(module()).last()}")
            here.wait_stream(self._stream)
        return output

    def refit(self, weights: Mapping[str, Tensor], check: Callable[[Engine], None]) -> None:
        """Put other weights in. They go into a second engine, and the first serves until that one has passed.

        Args:
            weights: all parameters of the transformer by name.
            check: called with the second engine; what it raises leaves the first one in service.

        Raises:
            EngineError: the plan cannot take them, or there is no memory for two engines.
        """
        second = copy.copy(self)
        second._engine, second._context = self._load(weights)
        check(second)
        self._stream.synchronize()  # the first may still be at work
        self._engine, self._context = second._engine, second._context


def refit(refitter: Any, weights: Mapping[str, Tensor]) -> None:
    """Replace weights through a `Refitter`, each by its own name. After an error the engine may hold some of them.

    Raises:
        EngineError: one is unknown to the engine, is of another size or type, or another one would be needed with it.
    """
    known = set(refitter.get_all_weights())
    if unknown := sorted(weights.keys() - known):
        raise EngineError(f"the plan does not take weights for {_list(unknown)}")
    held = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}  # until they have been read
    for name, weight in held.items():
        if not refitter.set_named_weights(name, _trt_weights(weight)):
            wanted = refitter.get_weights_prototype(name)
            raise EngineError(
                f"{name} has {weight.numel()} values of {weight.dtype}; the plan takes {wanted.size} of {wanted.dtype}"
            )
    if missing := refitter.get_missing_weights():
        raise EngineError(f"weights are missing for {_list(sorted(missing))}")
    if not refitter.refit_cuda_engine():
        raise EngineError(f"TensorRT could not put the weights in: {_logger(module()).last()}")


# --- all of it -------------------------------------------------------------------------------------------------------


def make(model: choice.Model, builds: Cache, sizes: Sequence[Shapes] = ()) -> TrtEngine:
    """An engine of a model's transformer, compared with PyTorch. Built only if no plan of its graph is there.

    The transformer is on the CPU afterwards; where this fails it is back on its GPU.

    Args:
        model: on a GPU.
        builds: where plans are kept. A plan of the same graph with other weights is given these.
        sizes: that the engine has to take, beside that of the model's inputs.

    Raises:
        EngineError: TensorRT is not here, the engine does not fit, cannot be built, or computes something else.
    """
    module()  # no work for nothing
    transformer = model.transformer
    device = transformer.device
    # Not at the same time as the engine: neither the builder nor two copies of the weights need fit beside it.
    expected = _Expected(EagerEngine(transformer), model.inputs)
    transformer.to("cpu")
    torch.cuda.empty_cache()
    try:
        builds.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="export-", dir=builds.folder) as scratch:  # as large as the weights
            return _make(model, builds, sizes, expected, Path(scratch))
    except BaseException:
        transformer.to(device)
        raise


class _Expected(Engine):
    """What PyTorch gave for one call."""

    name = "expected"

    def __init__(self, eager: EagerEngine, inputs: dict[str, Tensor]) -> None:
        super().__init__(eager.config, eager.dtype, eager.device)
        with torch.no_grad():
            self._output = eager.infer(inputs)

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:  # noqa: ARG002 (they are known)
        return self._output


def _make(model: choice.Model, builds: Cache, sizes: Sequence[Shapes], expected: _Expected, scratch: Path) -> TrtEngine:
    trt, transformer = module(), model.transformer
    weights = transformer.state_dict()
    weights_sha256 = student.weights_sha256(model.card.files, model.component)
    all_sizes = [{name: tuple(value.shape) for name, value in model.inputs.items()}, *sizes]
    axes = _axes(all_sizes, model.backbone.EXPORT_AXES)
    about: dict[str, Any] = {"model": model.card.name, "model_sha256": model.card.sha256, "engine": trt.__name__}
    about |= {"weights_sha256": weights_sha256, "versions": {trt.__name__: trt.__version__}, "gpu": _gpu()}

    @cache
    def exported() -> Path:
        path = scratch / "graph.onnx"
        shapes = _largest(all_sizes)
        inputs = {name: torch.zeros(shapes[name], dtype=value.dtype) for name, value in model.inputs.items()}
        with model.backbone.exporting(transformer):
            export.export(transformer, inputs, path, axes)
        return path

    # 1. The graph. What it is made from is known without exporting it, so that a restart need not.
    def describe(folder: Path) -> None:
        (folder / "structure.sha256").write_text(export.structure_sha256(exported(), weights))

    key = key_of(
        part="structure",
        transformer=type(transformer).__name__,
        parameters=_parameters(weights),
        sizes=all_sizes,
        backbone=model.card.backbone,
        **choice.graph_read(transformer.config, model.inputs, axes),
    )
    structure = (builds.get(key, describe, {"part": "structure", **about}) / "structure.sha256").read_text()

    # 2. The plan, and from it the engine.
    timings = builds.folder / f"timings-{key_of(module=trt.__name__, version=trt.__version__, gpu=_gpu())}"

    def attempt(key: str, refittable: bool) -> TrtEngine:
        built = Built(refittable, weights_sha256, _parameters(weights))
        made: list[Path] = []

        def write(folder: Path) -> None:
            made.append(folder)
            _write(folder, built=built, exported=exported, sizes=all_sizes, timings=timings)

        folder = builds.get(key, write, {"part": "plan", "refittable": refittable, **about})
        other = Built.read(folder).weights_sha256 != weights_sha256
        engine = TrtEngine(folder, transformer.config, expected.dtype, expected.device, weights if other else None)
        choice.check_parity(engine, expected, model.inputs, TOLERANCES[expected.dtype])
        engine.made = "build" if made else "refit" if other else "loaded"
        log.info("%s: %s", engine.name, "other weights put in" if other else "loaded")
        return engine

    read = {
        "structure": structure,
        "sizes": all_sizes,
        "dtype": str(expected.dtype),
        "module": [trt.__name__, trt.__version__],
        "gpu": _gpu(),
        "source": source_sha256(Path(__file__)),
    }
    replaceable = key_of(part="plan", **read)
    fixed = key_of(part="plan", weights=weights_sha256, **read)
    if not (builds.folder / fixed).is_dir():
        try:
            return attempt(replaceable, refittable=True)
        except EngineError as error:
            log.warning("no plan that takes other weights: %s; building one that does not", error)
    return attempt(fixed, refittable=False)


def _write(folder: Path, *, built: Built, exported: Callable[[], Path], sizes: Sequence[Shapes], timings: Path) -> None:
    """Build a plan into ``folder``."""
    plan = build(exported(), sizes, refittable=built.parameters if built.refittable else None, timing_cache=timings)
    (folder / _PLAN).write_bytes(plan)
    (folder / _BUILT).write_text(json.dumps(asdict(built)))


def _axes(sizes: Sequence[Shapes], allowed: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Of each input, the axes in which ``sizes`` differ. Raises ``EngineError`` if the backbone does not allow it."""
    axes = {}
    for name, (smallest, _, largest) in profile(sizes).items():
        axes[name] = tuple(i for i, (low, high) in enumerate(zip(smallest, largest, strict=True)) if low != high)
        if fixed := set(axes[name]) - set(allowed.get(name, ())):
            raise EngineError(f"{name} is wanted from {smallest} to {largest}; its axes {_list(fixed)} cannot differ")
    return axes


def _gpu() -> dict[str, str]:
    """What a plan is bound to."""
    driver = Path("/proc/driver/nvidia/version")
    properties = torch.cuda.get_device_properties()
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver.read_text().partition("\n")[0] if driver.exists() else "",
    }


# --- TensorRT's objects ----------------------------------------------------------------------------------------------


@cache
def _logger(trt: Any) -> Any:
    """One for the process, as TensorRT wants it. ``said`` holds errors, for the exception that follows them."""
    severity = trt.ILogger.Severity
    levels = {severity.INTERNAL_ERROR: logging.ERROR, severity.ERROR: logging.ERROR, severity.WARNING: logging.WARNING}

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity, logging.DEBUG)
            if level == logging.ERROR:
                self.said.append(message)
                level = logging.DEBUG  # an EngineError will say it
            log.log(level, "%s", message)

        def last(self) -> str:
            """The reason, or that there is none."""
            return self.said[-1] if self.said else "it gave no reason"

    return Log()


def _monitor(trt: Any) -> Any:
    """Says in the log how far a build is, every few seconds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._next_report = time.monotonic() + _REPORT_EVERY_S

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            if parent_phase is None:
                log.info("TensorRT: %s", phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() >= self._next_report:
                self._next_report = time.monotonic() + _REPORT_EVERY_S
                log.info("TensorRT: %s, %d of %d", phase_name, step + 1, self._steps.get(phase_name, 0))
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()


@cache
def _types(trt: Any) -> dict[Any, torch.dtype]:
    return {
        trt.DataType.FLOAT: torch.float32,
        trt.DataType.HALF: torch.float16,
        trt.DataType.BF16: torch.bfloat16,
        trt.DataType.INT64: torch.int64,
        trt.DataType.INT32: torch.int32,
        trt.DataType.BOOL: torch.bool,
    }


def _torch_type(dtype: Any) -> torch.dtype:
    return _types(module())[dtype]


def _trt_weights(weight: Tensor) -> Any:
    """By address: the weights are read from ``weight``, which has to live as long."""
    dtype = next(trt_type for trt_type, torch_type in _types(module()).items() if torch_type == weight.dtype)
    return module().Weights(dtype, weight.data_ptr(), weight.numel())


# --- words -----------------------------------------------------------------------------------------------------------


def _parameters(weights: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: [str(weight.dtype).removeprefix("torch."), list(weight.shape)] for name, weight in weights.items()}


def _text(parameter: list[Any]) -> str:
    dtype, shape = parameter
    return f"{dtype} {tuple(shape)}"


def _list(names: Any) -> str:
    """Not hundreds of them."""
    names = list(map(str, names))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB"
