"""`VideoPipeline`: an image and a sentence in, frames out. No queue, no HTTP.

Around the stock diffusers pipeline, its transformer replaced by an engine. `denoise` and `decode` are two calls: one
job's decoding can go on beside the next one's denoising. A caller may stop the work between steps by raising from
``on_progress``.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by the hub client when it is imported

import diffusers
import numpy as np
import torch
import transformers
from cachetools import LRUCache
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from distill import student
from distill.backbones import base as backbones
from worker.contract import ModelCard, Phase, VideoSize
from worker.engine import choice, memory
from worker.engine.base import Engine, Observed
from worker.engine.batching import BatchingEngine
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineLost, OutOfMemory
from worker.settings import Settings
from worker.video import tiles

_NO_MEMORY = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator",
    "Failed to allocate memory",
    "bad_alloc",
)
"""How libraries say that there is none: CUDA, cuBLAS, torch on a CPU, onnxruntime, C++."""

OnProgress = Callable[[Phase, float], None]
"""Called with the phase and the share of all work done, 0 to 1. What it raises ends the call."""


@dataclass(frozen=True)
class Options:
    """How a model is run."""

    device: str
    """"cpu" or "cuda"."""
    threads: int
    """Of each engine, for work on the CPU. The same number gives the same bytes."""
    engine: choice.Wanted
    text_cache_bytes: int
    """How much of what sentences were encoded to is kept."""

    @classmethod
    def of(cls, settings: Settings) -> Options:
        """As the worker's settings say; "auto" is decided here."""
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        # What moves or widens the weights at each use cannot be compiled.
        usual = device == "cuda" and (settings.offload, settings.casting) == ("none", "none")
        compile_blocks = usual if settings.compile == "auto" else settings.compile == "on"
        wanted = choice.Wanted(
            engine=settings.engine,
            compile=compile_blocks,
            cuda_graphs=settings.cuda_graphs,
            devices=settings.devices,
            offload=settings.offload,
            casting=settings.casting,
            folder=settings.engines,
            decode_memory_bytes=settings.decode_memory_mb * 2**20,
            max_batch=settings.max_batch,
        )
        return cls(
            device=device,
            threads=settings.torch_threads,
            engine=wanted,
            text_cache_bytes=settings.text_cache_mb * 2**20,
        )


@dataclass(frozen=True)
class Denoised:
    """A clip before it is decoded."""

    latents_BCTHW: Tensor
    timings_s: dict[Phase, float]


@dataclass(frozen=True)
class Result:
    """One generated clip."""

    frames_THWC: NDArray[np.uint8]
    timings_s: dict[Phase, float]


class VideoPipeline:
    """A model folder, loaded once and called many times."""

    def __init__(self, folder: Path, options: Options) -> None:
        """Check the folder, load it, make its engine.

        Raises:
            distill.student.FolderError: the folder cannot be used.
            worker.engine.base.EngineError: the engine was asked for by name, and it does not work here.
        """
        wanted = options.engine
        choice.check_settings(wanted)
        torch.set_num_threads(options.threads)
        for library in (diffusers, transformers):  # their progress bars and advice are not for a server's log
            library.utils.logging.disable_progress_bar()
            library.utils.logging.set_verbosity_error()
        self._folder = folder
        self.card = student.read_card(folder)
        self.device = options.device
        self.threads = options.threads
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        memory.place(self._pipe, offload=wanted.offload, casting=wanted.casting, device=torch.device(self.device))
        self._pipe.set_progress_bar_config(disable=True)
        self._texts = LRUCache[str, tuple[Tensor, Tensor | None]](options.text_cache_bytes, getsizeof=_bytes)
        self._text_lock = threading.Lock()
        # Of the time that each phase takes, for the progress: a guess that each call replaces by what it measured.
        self._shares = {Phase.ENCODING: 0.05, Phase.DENOISING: 0.75, Phase.DECODING: 0.2}
        self.first_tiles: NDArray[np.float32] | None = None
        """What the clip of the first `warm_up` looked like in little."""
        self._decoding_stream: Any = torch.cuda.Stream() if self.device == "cuda" else None  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.choice = choice.choose(self._model(), wanted)
        self._pipe.transformer = self.choice.engine

    @property
    def model_card(self) -> ModelCard:
        """What clients may know of this model."""
        return ModelCard(
            name=self.card.name,
            sha256=self.card.sha256,
            kind=self.card.kind,
            task=self.card.task,
            num_inference_steps=self.card.call["num_inference_steps"],
            video=VideoSize(**self.card.video.model_dump()),
            prompt=self.card.prompt,
        )

    @property
    def engine(self) -> str:
        """What runs the transformer, and where."""
        return self.choice.name

    def warm_up(self, on_progress: OnProgress = lambda _phase, _share: None) -> Result:
        """One whole call, always the same, so that the first job meets no lazy initialisation."""
        result = self(self._grey(), self.card.prompt.examples[0], seed=0, on_progress=on_progress)
        if self.first_tiles is None:
            self.first_tiles = tiles(result.frames_THWC)
        return result

    def free_memory(self) -> None:
        """Give up whatever is only kept to be faster."""
        with self._text_lock:
            self._texts.clear()
        memory.free()

    def __call__(
        self, image: Image.Image, prompt: str, *, seed: int, on_progress: OnProgress = lambda _phase, _share: None
    ) -> Result:
        """Generate one clip: see ``denoise`` and ``decode``."""
        denoised = self.denoise(image, prompt, seed=seed, on_progress=on_progress)
        frames_THWC = np.concatenate(list(self.decode(denoised, on_progress=on_progress)))
        return Result(frames_THWC, denoised.timings_s)

    @torch.no_grad()
    def denoise(
        self, image: Image.Image, prompt: str, *, seed: int, on_progress: OnProgress = lambda _phase, _share: None
    ) -> Denoised:
        """Make the latents of one clip.

        Args:
            image: RGB, of the model's size.
            prompt: in the model's canonical form.
            seed: of the starting noise; same seed, model, machine, engine and thread count give the same frames.
            on_progress: see ``OnProgress``.

        Raises:
            ValueError: the image has another size.
        """
        size = (self.card.video.width, self.card.video.height)
        if image.size != size:
            raise ValueError(f"the image is {image.size[0]} x {image.size[1]}; this model takes {size[0]} x {size[1]}")
        call = dict(self.card.call)
        marks = [self._clock()]
        encode_share, denoise_share = self._shares[Phase.ENCODING], self._shares[Phase.DENOISING]

        # 1. Encode the sentence here; the stock call encodes the image before its first step.
        on_progress(Phase.ENCODING, 0.0)
        embeds, negative_embeds = self._encode_text(prompt)

        # 2. Denoise. The transformer's first call marks the end of the encoding.
        def first_call(_inputs: dict[str, Tensor]) -> None:
            if len(marks) == 1:
                marks.append(self._clock())
                on_progress(Phase.DENOISING, encode_share)

        steps_done: list[Any] = []

        def step_end(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if self.device == "cuda":
                # Python runs ahead of the GPU. What is reported is what the GPU has done: the step before this one,
                # so that it always has a step to go on with.
                steps_done.append(torch.cuda.current_stream().record_event())
                if step == 0:
                    return values
                steps_done[step - 1].synchronize()
                step -= 1
            done = (step + 1) / call["num_inference_steps"]
            on_progress(Phase.DENOISING, encode_share + denoise_share * done)
            return values

        with self._taking_part(), _engine_errors():
            latents_BCTHW = self._own_pipe(Observed(self.choice.engine, first_call))(
                image=image,
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                callback_on_step_end=step_end,
                return_dict=False,
                **call,
            )[0]
        marks.append(self._clock())
        timings_s = {Phase.ENCODING: marks[1] - marks[0], Phase.DENOISING: marks[2] - marks[1]}
        on_progress(Phase.DECODING, encode_share + denoise_share)
        return Denoised(latents_BCTHW, timings_s)

    def decode(
        self, denoised: Denoised, *, on_progress: OnProgress = lambda _phase, _share: None
    ) -> Iterator[NDArray[np.uint8]]:
        """The frames of a clip, ``[T, H, W, 3]``, in pieces, each as soon as it is there.

        May run in another thread while the next clip is denoised. The time it takes, without what the caller does
        between the pieces, is added to ``denoised.timings_s``.
        """
        start_share = self._shares[Phase.ENCODING] + self._shares[Phase.DENOISING]
        seconds, done = 0.0, 0
        pieces = self._pieces(denoised.latents_BCTHW)
        while True:
            started = time.perf_counter()
            frames_THWC = next(pieces, None)
            seconds += time.perf_counter() - started
            if frames_THWC is None:
                break
            done += len(frames_THWC)
            on_progress(Phase.DECODING, start_share + (1 - start_share) * done / self.card.video.num_frames)
            yield frames_THWC
        denoised.timings_s[Phase.DECODING] = seconds
        total = sum(denoised.timings_s.values())
        self._shares = {phase: taken / total for phase, taken in denoised.timings_s.items()}

    def _pieces(self, latents_BCTHW: Tensor) -> Iterator[NDArray[np.uint8]]:
        """On a GPU each piece is on its way to the CPU while the next one is decoded."""
        waiting: Callable[[], NDArray[np.uint8]] | None = None
        # Entered anew for each piece: a generator that is left half-way must not leave its settings to the caller.
        pieces = iter(self.choice.decoder(latents_BCTHW))
        while True:
            with torch.no_grad(), torch.cuda.stream(self._decoding_stream), _engine_errors():
                piece = next(pieces, None)
                before, waiting = waiting, None if piece is None else _on_its_way(piece)
            if before:
                yield before()
            if waiting is None:
                return

    def _own_pipe(self, engine: Engine) -> Any:
        """The stock pipeline for one call. Several may run at once, and scheduler and autoencoder remember things."""
        pipe = copy.copy(self._pipe)
        pipe.transformer = engine
        pipe.scheduler = copy.deepcopy(self._pipe.scheduler)
        pipe.vae = copy.copy(self._pipe.vae)
        return pipe

    def _taking_part(self) -> AbstractContextManager[None]:
        engine = self.choice.engine
        return engine.taking_part() if isinstance(engine, BatchingEngine) else nullcontext()

    def _encode_text(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the sentence, and of the empty one where the model is guided."""
        with self._text_lock:
            if (found := self._texts.get(prompt)) is not None:
                return found
            return self._encode_anew(prompt)

    def _encode_anew(self, prompt: str) -> tuple[Tensor, Tensor | None]:
        guided, length = self.card.call["guidance_scale"] > 1, self.card.call["max_sequence_length"]
        made: tuple[Tensor, Tensor | None] = self._pipe.encode_prompt(
            prompt, None, guided, max_sequence_length=length, device=self._pipe.device
        )
        if _bytes(made) <= self._texts.maxsize:
            self._texts[prompt] = made
        return made

    def _model(self) -> choice.Model:
        """What engines are made from, with the inputs of a real call: one step of the stock pipeline."""
        seen: dict[str, Tensor] = {}
        recorder = Observed(EagerEngine(self._pipe.transformer), seen.update)

        def stop(_pipe: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            raise _SeenEnough(values["latents"])

        embeds, negative_embeds = self._encode_text(self.card.prompt.examples[0])
        try:
            self._own_pipe(recorder)(
                image=self._grey(),
                prompt_embeds=embeds,
                negative_prompt_embeds=negative_embeds,
                generator=torch.Generator("cpu").manual_seed(0),
                callback_on_step_end=stop,
                **self.card.call,
            )
            raise RuntimeError(f"{type(self._pipe).__name__} made a clip without ending a step")
        except _SeenEnough as enough:
            latents_BCTHW: Tensor = enough.args[0]
        return choice.Model(
            pipe=self._pipe,
            folder=self._folder,
            card=self.card,
            backbone=backbones.load(self.card.backbone, self.card.task),
            inputs={name: value.contiguous() for name, value in seen.items()},
            latents_BCTHW=latents_BCTHW,
            threads=self.threads,
        )

    def _grey(self) -> Image.Image:
        return Image.new("RGB", (self.card.video.width, self.card.video.height), (128, 128, 128))

    def _clock(self) -> float:
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # and not the decoding of the clip before
        return time.perf_counter()


@contextmanager
def _engine_errors() -> Iterator[None]:
    """What went wrong, as far as it decides what comes next; the rest goes through."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from None  # without its traceback, which holds all that was computed
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise OutOfMemory(str(error)) from None
        if isinstance(error, torch.AcceleratorError):  # of the GPU itself: every later call of the process fails too
            raise EngineLost(f"the GPU cannot be used any more: {error}") from error
        raise


class _SeenEnough(Exception):
    """Ends the recording of a call."""


def _on_its_way(piece_BCTHW: Tensor) -> Callable[[], NDArray[np.uint8]]:
    """Start bringing a piece of one video in [-1, 1] to the CPU as bytes; call the result for ``[T, H, W, 3]``."""
    levels = (piece_BCTHW[0].float() * 0.5 + 0.5).clamp(0, 1) * 255
    frames_THWC = levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
    if frames_THWC.device.type == "cpu":
        return frames_THWC.numpy
    there = torch.empty(frames_THWC.shape, dtype=torch.uint8, pin_memory=True)
    there.copy_(frames_THWC, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def wait() -> NDArray[np.uint8]:
        copied.synchronize()
        frames: NDArray[np.uint8] = there.numpy()
        return frames

    return wait


def _bytes(texts: tuple[Tensor, Tensor | None]) -> int:
    return sum(text.nbytes for text in texts if text is not None)
