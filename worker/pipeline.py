"""`VideoPipeline`: a sentence and an image or a video in, as the model takes them; frames out. No queue, no HTTP.

Around the stock diffusers pipeline, its transformer replaced by an engine. `denoise` and `decode` are two calls: one
job's decoding can go on beside the next one's denoising. A caller may stop the work between steps by raising from
``on_progress``.
"""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
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

from distill import schedule, student
from distill.backbones import base as backbones
from worker.contract import TAKES, ModelCard, Phase, Source, VideoSize, first_step
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
    first_step: int | None = None
    """Where it was started from a video: the step that it began with."""


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
        self._takes: tuple[Source, ...] = TAKES[self.card.task]
        self._backbone = backbones.load(self.card.backbone, self.card.task)
        self.device = options.device
        self.threads = options.threads
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self._pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
        memory.place(self._pipe, offload=wanted.offload, casting=wanted.casting, device=torch.device(self.device))
        self._pipe.set_progress_bar_config(disable=True)
        self._texts = LRUCache[str, dict[str, Any]](options.text_cache_bytes, getsizeof=_bytes)
        self._text_lock = threading.Lock()
        # Of the time that each phase takes, for the progress: a guess that each call replaces by what it measured.
        self._shares = {Phase.ENCODING: 0.05, Phase.DENOISING: 0.75, Phase.DECODING: 0.2}
        self.first_tiles: NDArray[np.float32] | None = None
        """What the clip of the first `warm_up` looked like in little."""
        self._decoding_stream: Any = torch.cuda.Stream() if self.device == "cuda" else None  # type: ignore[no-untyped-call]
        network = self._backbone.network(self._pipe)
        self._guided = self._backbone.guidance_at(network, self.card.call, 1.0) > 1
        others = [name for name in self._backbone.networks(network) if name != "transformer"]
        choice.check_experts(wanted, len(others))
        with torch.no_grad():
            model = self._model()
            self.choice = choice.choose(model, wanted)
            self._engines = {"transformer": self.choice.engine}
            self._engines |= {name: choice.choose_other(model, name, wanted, self.choice) for name in others}
        for name, engine in self._engines.items():
            setattr(self._pipe, name, engine)

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
            sigmas=self.card.sigmas if "video" in self._takes else (),
        )

    @property
    def engine(self) -> str:
        """What runs the transformer, and where."""
        return self.choice.name

    def warm_up(self, on_progress: OnProgress = lambda _phase, _share: None) -> Result:
        """One whole call, always the same, so that the first job meets no lazy initialisation."""
        size = self.card.video
        image = self._grey() if "image" in self._takes else None
        of_video: dict[str, Any] = {}
        if self._takes[0] == "video":
            grey_THWC = np.full((size.num_frames, size.height, size.width, 3), 128, np.uint8)
            of_video = {"video_THWC": grey_THWC, "strength": 1.0}
        result = self(image, self.card.prompt.examples[0], seed=0, on_progress=on_progress, **of_video)
        if self.first_tiles is None:
            self.first_tiles = tiles(result.frames_THWC)
        return result

    def free_memory(self) -> None:
        """Give up whatever is only kept to be faster."""
        with self._text_lock:
            self._texts.clear()
        memory.free()

    def __call__(
        self,
        image: Image.Image | None,
        prompt: str,
        *,
        seed: int,
        video_THWC: NDArray[np.uint8] | None = None,
        strength: float | None = None,
        on_progress: OnProgress = lambda _phase, _share: None,
    ) -> Result:
        """Generate one clip: see ``denoise`` and ``decode``."""
        denoised = self.denoise(
            image, prompt, seed=seed, video_THWC=video_THWC, strength=strength, on_progress=on_progress
        )
        frames_THWC = np.concatenate(list(self.decode(denoised, on_progress=on_progress)))
        return Result(frames_THWC, denoised.timings_s)

    @torch.no_grad()
    def denoise(
        self,
        image: Image.Image | None,
        prompt: str,
        *,
        seed: int,
        video_THWC: NDArray[np.uint8] | None = None,
        strength: float | None = None,
        on_progress: OnProgress = lambda _phase, _share: None,
    ) -> Denoised:
        """Make the latents of one clip.

        Args:
            image: RGB, of the model's size; for a model that takes one.
            prompt: in the model's canonical form.
            seed: of the starting noise; same seed, model, machine, engine and thread count give the same frames.
            video_THWC: RGB, of the model's size and number of frames: what to start from, for a model that takes one.
            strength: of it, above 0 to 1: noise is laid over it up to the one of the model's noise levels that is
                nearest to this, and the steps from there on are made.
            on_progress: see ``OnProgress``.

        Raises:
            ValueError: the model takes no such input, or it has another size.
        """
        self._check(image, video_THWC, strength)
        call, num_steps, first = self._backbone.arguments(self.card.call), len(self.card.sigmas), 0
        marks = [self._clock()]
        encode_share, denoise_share = self._shares[Phase.ENCODING], self._shares[Phase.DENOISING]

        # 1. Encode the sentence here, and a video; the stock call encodes an image before its first step.
        on_progress(Phase.ENCODING, 0.0)
        call |= self._encode_text(prompt, image)

        # 2. Denoise. The transformer's first call marks the end of the encoding.
        def first_call(_inputs: dict[str, Tensor]) -> None:
            if len(marks) == 1:
                marks.append(self._clock())
                on_progress(Phase.DENOISING, encode_share)

        steps_done: list[Any] = []
        stepped: list[Tensor] = []

        def step_end(done: int, made_BCTHW: Tensor) -> None:
            stepped[:] = [made_BCTHW]
            if self.device == "cuda":
                # Python runs ahead of the GPU. What is reported is what the GPU has done: the step before this one,
                # so that it always has a step to go on with.
                steps_done.append(torch.cuda.current_stream().record_event())
                if done == 1:
                    return
                done -= 1
                steps_done[done - 1].synchronize()
            on_progress(Phase.DENOISING, encode_share + denoise_share * done / (num_steps - first))

        with self._taking_part(), _engine_errors():
            if image is not None:
                call["image"] = image
            if video_THWC is not None and strength is not None:
                first = first_step(self.card.sigmas, strength)
                call["latents"] = self._noisy(video_THWC, self.card.sigmas[first], seed)
            scheduler = _telling(schedule.started_at(self._pipe.scheduler, first), step_end)
            engines = {name: Observed(engine, first_call) for name, engine in self._engines.items()}
            given_BCTHW = self._own_pipe(engines, scheduler)(
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="latent",
                return_dict=False,
                **call,
            )[0]
            latents_BCTHW = self._backbone.latents_to_decode(given_BCTHW, stepped[0])
        marks.append(self._clock())
        timings_s = {Phase.ENCODING: marks[1] - marks[0], Phase.DENOISING: marks[2] - marks[1]}
        on_progress(Phase.DECODING, encode_share + denoise_share)
        return Denoised(latents_BCTHW, timings_s, first if video_THWC is not None else None)

    def _check(self, image: Image.Image | None, video_THWC: NDArray[np.uint8] | None, strength: float | None) -> None:
        """Whether the model takes this. Raises ``ValueError``."""
        got: Source = "image" if image is not None else "video" if video_THWC is not None else "none"
        if got not in self._takes:
            takes = " or ".join(self._takes)
            raise ValueError(f"the input is {got}; {self.card.name} (task {self.card.task}) takes {takes}")
        size = self.card.video
        if image is not None and image.size != (size.width, size.height):
            raise ValueError(
                f"the image is {image.size[0]} x {image.size[1]}; this model takes {size.width} x {size.height}"
            )
        if video_THWC is not None and video_THWC.shape != (size.num_frames, size.height, size.width, 3):
            raise ValueError(
                f"the video is {video_THWC.shape}; this model takes {size.num_frames} frames of "
                f"{size.width} x {size.height}"
            )
        if (strength is None) != (video_THWC is None) or (strength is not None and not 0 < strength <= 1):
            raise ValueError(f"strength is {strength}; wanted a number above 0 and up to 1 with a video, else none")

    def _noisy(self, video_THWC: NDArray[np.uint8], sigma: float, seed: int) -> Tensor:
        """Latents of a video with noise over them: x_sigma = (1 - sigma) x_0 + sigma noise."""
        device = self._pipe._execution_device  # where weights come to that wait elsewhere
        video_BCTHW = torch.from_numpy(video_THWC).permute(3, 0, 1, 2)[None].to(device).float() / 127.5 - 1
        # The autoencoder remembers things.
        x0_BCTHW: Tensor = self._backbone.encode_video(copy.copy(self._pipe.vae), video_BCTHW).float()
        # As the stock pipelines draw it, so that a video of which nothing is left makes no difference.
        noise_BCTHW = torch.randn(x0_BCTHW.shape, generator=torch.Generator("cpu").manual_seed(seed)).to(x0_BCTHW)
        return (1 - sigma) * x0_BCTHW + sigma * noise_BCTHW

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

    def _own_pipe(self, engines: Mapping[str, Engine], scheduler: Any) -> Any:
        """The stock pipeline for one call, with a scheduler of its own. Several may run at once, and scheduler and
        autoencoder remember things."""
        pipe = copy.copy(self._pipe)
        for name, engine in engines.items():
            setattr(pipe, name, engine)
        pipe.scheduler = scheduler
        pipe.vae = copy.copy(self._pipe.vae)
        return pipe

    def _taking_part(self) -> AbstractContextManager[None]:
        engine = self.choice.engine
        return engine.taking_part() if isinstance(engine, BatchingEngine) else nullcontext()

    def _encode_text(self, prompt: str, image: Image.Image | None) -> dict[str, Any]:
        """What stands for the sentence in the stock call, and for the negative one where the model is guided."""
        with self._text_lock:
            if (found := self._texts.get(prompt)) is not None:
                return found
            return self._encode_anew(prompt, image)

    def _encode_anew(self, prompt: str, image: Image.Image | None) -> dict[str, Any]:
        of, call = self._backbone, self.card.call
        first_BCHW = None
        if of.TEXT_SEES_IMAGE and image is not None:
            first_BCHW = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        made = of.text_inputs(
            of.encode_text(self._pipe, [prompt], call, first_BCHW),
            of.encode_text(self._pipe, [backbones.negative_prompt(call)], call) if self._guided else None,
        )
        if first_BCHW is None and _bytes(made) <= self._texts.maxsize:
            self._texts[prompt] = made
        return made

    def _model(self) -> choice.Model:
        """What engines are made from, with the inputs of a real call: the first step of the stock pipeline."""
        seen: dict[str, Tensor] = {}
        recorder = {"transformer": Observed(EagerEngine(self._pipe.transformer), seen.update)}
        image = self._grey() if "image" in self._takes else None
        call = self._backbone.arguments(self.card.call) | self._encode_text(self.card.prompt.examples[0], image)
        stepped: list[Tensor] = []
        one_step = _telling(schedule.started_at(self._pipe.scheduler, 0, 1), lambda _done, made: stepped.append(made))
        given_BCTHW = self._own_pipe(recorder, one_step)(
            **({} if image is None else {"image": image}),
            generator=torch.Generator("cpu").manual_seed(0),
            output_type="latent",
            return_dict=False,
            **call,
        )[0]
        return choice.Model(
            pipe=self._pipe,
            folder=self._folder,
            card=self.card,
            backbone=self._backbone,
            inputs={name: value.contiguous() for name, value in seen.items()},
            latents_BCTHW=self._backbone.latents_to_decode(given_BCTHW, stepped[0]),
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


def _telling(scheduler: Any, step_end: Callable[[int, Tensor], None]) -> Any:
    """The scheduler itself, which from now on calls ``step_end`` after each step with the number of those made, and
    with what it made.

    Every stock pipeline asks its scheduler for each step once, however often it calls which transformer for it, and not
    all of them take a callback.
    """
    step, done = scheduler.step, 0

    @wraps(step)  # with its signature, which some pipelines look at
    def told(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        made = step(*args, **kwargs)
        done += 1
        step_end(done, made[0])
        return made

    scheduler.step = told
    return scheduler


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


def _bytes(texts: Mapping[str, Any]) -> int:
    return sum(text.nbytes for text in texts.values() if isinstance(text, Tensor))
