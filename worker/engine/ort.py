"""onnxruntime: on a CPU it takes half of PyTorch's time for the transformer and a third for the decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from worker.engine.base import Engine


class OrtEngine(Engine):
    """An exported transformer on the CPU."""

    name = "ort-cpu"

    def __init__(self, path: Path, config: Any, threads: int) -> None:
        """
        Args:
            path: an ONNX file (`worker.engine.export`) in full precision.
            config: of the transformer it was exported from.
            threads: same number, same bytes.
        """
        super().__init__(config, torch.float32, torch.device("cpu"))
        self._run = Session(path, threads)

    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``."""
        return self._run(**inputs)


class Session:
    """An ONNX file as a function of tensors."""

    def __init__(self, path: Path, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that wait in a loop would take the core from ffmpeg and from the service.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The graph's only output."""
        arrays = {name: value.detach().contiguous().numpy() for name, value in inputs.items()}
        return torch.from_numpy(self._session.run(None, arrays)[0])
