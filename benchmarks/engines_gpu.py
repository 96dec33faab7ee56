"""What one pass costs at true size, with random weights: `python -m benchmarks.engines_gpu` on a machine with a GPU.

Wan2.1 1.3B and 14B at 480 x 832 x 81: the teacher and a student with 70 % of its blocks, by PyTorch, by PyTorch with
compiled blocks and, where it is installed, by TensorRT; the text encoder, the autoencoder's decoder and the MP4 beside
them. Medians of passes; a whole denoising is so many times the median pass (100 for the guided teacher's 50 steps, 4
for the student), which the table says. `--rehearse` takes tiny shapes on whatever there is, to see that it runs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import UMT5Config, UMT5EncoderModel

from distill.backbones import wan
from worker import video
from worker.engine import trt
from worker.engine.base import Engine
from worker.engine.cache import Cache
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineError

RHO = 0.3
TEACHER_PASSES, STUDENT_PASSES = 100, 4


@dataclass(frozen=True)
class Shape:
    """A model and the video that it is asked for."""

    name: str
    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    text_dim: int
    text_tokens: int
    text_layers: int
    width: int
    height: int
    num_frames: int

    def transformer(self, num_layers: int) -> WanTransformer3DModel:
        """With random weights in bf16, but for those that diffusers keeps in full precision when it loads some."""
        transformer = WanTransformer3DModel(
            num_layers=num_layers,
            num_attention_heads=self.num_heads,
            attention_head_dim=self.head_dim,
            ffn_dim=self.ffn_dim,
            text_dim=self.text_dim,
        ).eval()
        for name, weight in transformer.named_parameters():
            if not any(kept in name for kept in transformer._keep_in_fp32_modules):
                weight.data = weight.data.bfloat16()
        return transformer

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Of one pass."""
        frames, height, width = 1 + (self.num_frames - 1) // 4, self.height // 8, self.width // 8
        return {
            "hidden_states": torch.randn(1, 16, frames, height, width, device=device, dtype=dtype),
            "timestep": torch.full((1,), 900.0, device=device),
            "encoder_hidden_states": torch.randn(1, self.text_tokens, self.text_dim, device=device, dtype=dtype),
        }


_SMALL = Shape("Wan2.1 1.3B", 30, 12, 128, 8960, 4096, 512, 24, 832, 480, 81)
SHAPES = [_SMALL, Shape("Wan2.1 14B", 40, 40, 128, 13824, 4096, 512, 24, 832, 480, 81)]
REHEARSAL = [Shape("tiny", 10, 2, 32, 128, 64, 16, 2, 64, 64, 9)]


class Clock:
    """Median seconds of a piece of work, on the GPU's own clock where there is one."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._gpu = device.type == "cuda"
        self._repeats = repeats

    def __call__(self, work: Callable[[], Any]) -> float:
        with torch.no_grad():
            work()
            work()
            return statistics.median(self._once(work) for _ in range(self._repeats))

    def _once(self, work: Callable[[], Any]) -> float:
        if not self._gpu:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def main() -> int:
    """Exit code 2: there is no GPU and no rehearsal was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--shapes", nargs="*", help="names; without it, all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("engines_gpu.md"))
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.rehearse:
        sys.stderr.write("error: no GPU is here, and these shapes need one; --rehearse tries the script at tiny size\n")
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, options.repeats)
    shapes = REHEARSAL if options.rehearse else [s for s in SHAPES if s.name in (options.shapes or [s.name])]
    matmul = matmul_flops(device, clock, 256 if options.rehearse else 8192)
    sections = []
    for shape in shapes:
        sections.append(measure(shape, device, clock, matmul))
        options.out.write_text(_page(device, options, matmul, sections))  # what is done is not lost
    sys.stdout.write(options.out.read_text())
    return 0


def measure(shape: Shape, device: torch.device, clock: Clock, matmul: float) -> str:
    """One shape's tables."""
    dtype = torch.bfloat16
    inputs = shape.inputs(device, dtype)
    student_layers = shape.num_layers - round(RHO * shape.num_layers)
    rows, passes = [], dict[tuple[str, str], float]()
    for role, layers, count in (
        ("teacher", shape.num_layers, TEACHER_PASSES),
        ("student", student_layers, STUDENT_PASSES),
    ):
        with torch.device(device):
            transformer = shape.transformer(layers)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            transformer(**inputs, return_dict=False)
        flops = counter.get_total_flops()
        for name, engine in engines(transformer, inputs):
            _reset_peak(device)
            if isinstance(engine, str):
                rows.append(f"| {role} | {name} | not measured: {engine} | | | | |")
                continue
            seconds = clock(lambda engine=engine: engine.infer(inputs))
            passes[role, name] = seconds
            rows.append(
                f"| {role}, {layers} blocks | {name} | {1000 * seconds:.1f} | {flops / 1e12:.2f} "
                f"| {flops / seconds / matmul:.0%} | {_peak_gb(device)} | {count * seconds:.2f} |"
            )
        del transformer, engine
        _reset_peak(device)
    around = {
        "text encoder": clock(text_encoder(shape, device, dtype)),
        "decoder": clock(decoder(shape, device)),
        "MP4": mux_s(shape),
    }
    best = min(seconds for (role, _), seconds in passes.items() if role == "student")
    rest = sum(around.values())
    ratios = ", ".join(
        f"{name} {passes['student', name] / passes['teacher', name]:.3f}"
        for role, name in passes
        if role == "teacher" and ("student", name) in passes
    )
    body = "\n".join(rows)
    return f"""## {shape.name}, {shape.width} x {shape.height} x {shape.num_frames}

| | engine | ms a pass | TFLOP | of the matmul rate | peak GB | denoising, s |
|---|---|---:|---:|---:|---:|---:|
{body}

Denoising is {TEACHER_PASSES} passes of the teacher, {STUDENT_PASSES} of the student. Student's pass over teacher's: \
{ratios} (goal .72). Around it: {", ".join(f"{name} {seconds:.2f} s" for name, seconds in around.items())}; that is \
{rest / (rest + STUDENT_PASSES * best):.0%} of a student's request (goal 35 %).
"""


def engines(transformer: Any, inputs: dict[str, Tensor]) -> Iterator[tuple[str, Engine | str]]:
    """Each engine by name, or why there is none."""
    yield "eager", EagerEngine(transformer)
    yield "compiled blocks", EagerEngine(transformer, compile_blocks=True)
    if transformer.device.type == "cpu":
        yield "TensorRT", "it needs a GPU"
        return
    card = SimpleNamespace(name="random", sha256="", files={"transformer/weights": "random"})
    model: Any = SimpleNamespace(pipe=SimpleNamespace(transformer=transformer), card=card, backbone=wan, inputs=inputs)
    weights = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            started = time.monotonic()
            engine = trt.make(model, Cache(Path(folder)))
            built_s = time.monotonic() - started
            started = time.monotonic()
            engine.refit(weights, lambda _engine: None)
            yield f"TensorRT: export and build {built_s:.0f} s, refit {time.monotonic() - started:.1f} s", engine
        except EngineError as error:
            yield "TensorRT", str(error)


def text_encoder(shape: Shape, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    """One sentence through an encoder of umT5-XXL's shape."""
    config = UMT5Config(
        d_model=shape.text_dim, d_kv=64, d_ff=int(2.5 * shape.text_dim), num_layers=shape.text_layers,
        num_heads=max(shape.text_dim // 64, 1), vocab_size=256384, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device(device):
        model = UMT5EncoderModel(config).to(dtype).eval()
    ids = torch.randint(config.vocab_size, (1, shape.text_tokens), device=device)
    return lambda: model(ids)


def decoder(shape: Shape, device: torch.device) -> Callable[[], Any]:
    """A clip through Wan2.1's autoencoder, in pieces, as bytes on the CPU."""
    with torch.device(device):
        vae = AutoencoderKLWan().to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    frames = 1 + (shape.num_frames - 1) // 4
    latents = torch.randn(1, 16, frames, shape.height // 8, shape.width // 8, device=device)

    def decode() -> None:
        for piece in wan.decode_in_pieces(vae, latents):
            ((piece.float() * 0.5 + 0.5) * 255).to(torch.uint8).cpu()

    return decode


def mux_s(shape: Shape) -> float:
    """Seconds for the MP4 of moving stripes: noise would be no fair picture."""
    x = np.arange(shape.width)[None, None, :] + 4 * np.arange(shape.num_frames)[:, None, None]
    grey = (127 + 100 * np.sin(x / 40)).astype(np.uint8)
    frames = np.broadcast_to(grey[..., None], (shape.num_frames, shape.height, shape.width, 3))
    started = time.perf_counter()
    video.encode_mp4(np.ascontiguousarray(frames), 16)
    return time.perf_counter() - started


def matmul_flops(device: torch.device, clock: Clock, size: int) -> float:
    """FLOP a second of a large bf16 matrix product: what "all of the GPU" means here."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / clock(lambda: a @ b)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_gb(device: torch.device) -> str:
    return f"{torch.cuda.max_memory_allocated() / 1e9:.1f}" if device.type == "cuda" else "-"


def _page(device: torch.device, options: argparse.Namespace, matmul: float, sections: list[str]) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})"
    title = "# A rehearsal: no figure here means anything" if options.rehearse else "# One pass at true size"
    return f"""{title}

`python -m benchmarks.engines_gpu`: random weights, bf16, medians of {options.repeats} after two warm-ups. {name}, \
torch {version("torch")}, diffusers {version("diffusers")}. A bf16 matrix product runs at {matmul / 1e12:.1f} TFLOP/s.

{chr(10).join(sections)}"""


if __name__ == "__main__":
    raise SystemExit(main())
