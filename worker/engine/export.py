"""ONNX of a transformer and of a decoder, written so that every parameter keeps its name.

The names are what lets a re-distilled student's weights be put into an engine that is already built: each parameter of
the module is an initializer of the same name, shape and type. torch's exporter keeps them all if it optimises nothing
(`optimize=False`); the engines optimise for themselves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import onnx
import torch
from onnx.numpy_helper import from_array
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from torch import Tensor, nn

from worker.engine.errors import EngineError

OPSET = 23
"""The first with `Attention` and `RMSNormalization`, which both engines fuse."""
OUTPUT = "output"
_TYPES = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
}
_PARAMETERS = "parameters"
"""Entry of the file with the names of the parameters; buffers and constants are initializers as well."""
_EXTERNAL_ABOVE_BYTES = 1_900_000_000  # one protobuf message ends at 2 GiB


def export(module: nn.Module, inputs: Mapping[str, Tensor], path: Path, axes: Mapping[str, tuple[int, ...]]) -> None:
    """Write ``module`` as ONNX. Above 2 GB the weights stand beside it, in ``path`` plus ".data".

    Args:
        module: called by keyword with ``return_dict=False``, as diffusers' models are. Its parameters give the types:
            what is fp16 here is fp16 there.
        inputs: of one real call.
        path: of the ONNX file; its folder exists.
        axes: of each input, those that may have another size in another call; none of them: a static graph.

    Raises:
        EngineError: it cannot be exported, or the graph does not hold every parameter under its name.
    """
    dynamic: dict[str, Any] = {name: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) for name in inputs}
    with torch.no_grad(), warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")  # of copies that the tracer makes
        try:
            program = torch.onnx.export(
                module,
                (),
                kwargs={**inputs, "return_dict": False},
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                dynamic_shapes={**dynamic, "return_dict": None} if any(dynamic.values()) else None,
                output_names=[OUTPUT],
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
            raise EngineError(f"{type(module).__name__} cannot be exported: {reason}") from error
    assert program is not None  # None is what the old exporter returns
    # A split leaves the exporter as a sequence and what is taken from it, and TensorRT reads no sequences. Nothing else
    # is folded: that would take parameters away.
    optimizer.fold_constants(program.model, should_fold=lambda _node: False)
    optimizer.remove_unused_nodes(program.model)
    ClearMetadataAndDocStringPass()(program.model)  # where in whose sources each operator comes from
    program.model.metadata_props[_PARAMETERS] = json.dumps(sorted(module.state_dict()))
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    program.save(str(path), external_data=weights > _EXTERNAL_ABOVE_BYTES)
    check_names(path, module.state_dict())


def check_names(path: Path, weights: Mapping[str, Tensor]) -> None:
    """``weights`` are all of the module's, each an initializer of its own name, shape and type.

    Raises:
        EngineError: one is missing, or is no such initializer; weights could not be put in by name.
    """
    model = onnx.load(path, load_external_data=False)
    expected = {entry.key: entry.value for entry in model.metadata_props}[_PARAMETERS]
    if missing := sorted(set(json.loads(expected)) - weights.keys()):
        raise EngineError(f"{path.name}: no weights are given for {len(missing)} parameters, as {missing[0]}")
    found = {tensor.name: (tuple(tensor.dims), tensor.data_type) for tensor in model.graph.initializer}
    for name, weight in weights.items():
        wanted = tuple(weight.shape), _TYPES[weight.dtype]
        if found.get(name) != wanted:
            raise EngineError(
                f"{path.name}: parameter {name} should be an initializer of shape and ONNX type {wanted}; "
                f"the graph has {found.get(name, 'none of that name')}"
            )


def with_weights(path: Path, weights: Mapping[str, Tensor], out: Path) -> None:
    """Write the graph of ``path`` with other weights of the same names, as a refit does to an engine.

    Raises:
        EngineError: a weight is missing, left over, or of another shape or type. Nothing is written then.
    """
    check_names(path, weights)
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(from_array(_numpy(weights[tensor.name]), tensor.name))
    external = sum(weight.nbytes for weight in weights.values()) > _EXTERNAL_ABOVE_BYTES
    onnx.save(model, out, save_as_external_data=external, location=f"{out.name}.data")


def structure_sha256(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Hash of the graph without the values of ``weights``: two students that differ in these alone have the same."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            for field in ("raw_data", "float_data", "external_data", "data_location"):
                tensor.ClearField(field)
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _numpy(weight: Tensor) -> Any:
    weight = weight.detach().cpu().contiguous()
    if weight.dtype == torch.bfloat16:  # which numpy knows by this package alone
        return weight.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return weight.numpy()


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """The exporter warns of operators that are not installed and not used."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
