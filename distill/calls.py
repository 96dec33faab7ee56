"""What calling a network takes, found without its weights: for `distill.plan`.

Parameters are counted on the real classes without memory for their weights (the meta device). What a call keeps and
computes is found by making it, with its way back, on tensors that have a shape and no values, at the true number of
tokens but with few blocks: everything is linear in their number.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from distill import empty, student
from distill.backbones import base
from distill.backbones.base import Backbone, Call
from distill.backbones.conditions import Conditions, Shapes
from distill.config import ConfigError
from distill.loop import computed_again
from distill.released import RELEASED
from distill.stages import heads
from distill.stages.matching import add_adapter

FP32, BF16 = 4, 2
"""Bytes of a number."""
Trained = Literal["nothing", "all", "lora"]
DEPTHS: dict[Trained, tuple[int, int]] = {"nothing": (1, 2), "all": (1, 2), "lora": (2, 3)}
"""Blocks of a kind that are run. Into the first one no gradient flows where what is before it is frozen."""
Weights = list[torch.Size]
"""Their shapes."""


# --- the teacher, without its weights ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Teacher:
    """Everything of a pipeline but the values of its weights."""

    name: str
    source: str
    """Where its shape is known from."""
    backbone: Backbone
    pipe: Any
    call: Call
    encoder_bytes: int
    """Of what encodes texts and images, in full precision."""

    @property
    def network(self) -> Any:
        """What is distilled."""
        return self.backbone.network(self.pipe)

    @property
    def models(self) -> list[Any]:
        """One, or two experts."""
        return list(self.backbone.networks(self.network).values())


def teacher_of(folder: Path, known: bool) -> Teacher:
    """A teacher by its folder, or, where there is none and ``known`` is true, the released model of that name.

    Raises:
        ConfigError: there is no folder, and no such model whose shape is known here.
        FolderError: the folder has no card, or is no pipeline.
    """
    if folder.is_dir():
        return _of_folder(folder)
    name = folder.name
    if not known or name not in RELEASED:
        raise ConfigError(
            f"there is no folder {folder}; without a folder the shapes of these models are known: {', '.join(RELEASED)}"
        )
    released = RELEASED[name]
    parts = {name: empty.Part(*part) for name, part in released.parts.items()}
    pipe, encoders = _empty_pipeline(released.pipeline, parts, released.settings)
    backbone = base.load(released.backbone, released.task)
    return Teacher(name, released.source, backbone, pipe, dict(released.call), encoders)


def _of_folder(folder: Path) -> Teacher:
    card = student.parse_card(student.card_path(folder))
    index = json.loads((folder / "model_index.json").read_text())
    settings = {
        name: value for name, value in index.items() if not name.startswith("_") and not isinstance(value, list)
    }
    pipe, encoders = _empty_pipeline(index["_class_name"], empty.parts(folder), settings)
    backbone = base.load(card.backbone, card.task)
    return Teacher(card.name, f"{folder}", backbone, pipe, dict(card.call), encoders)


def _empty_pipeline(kind: str, parts: Mapping[str, empty.Part], settings: Mapping[str, Any]) -> tuple[Any, int]:
    """A stock pipeline of networks without memory for their weights (and of nothing else), and the encoders' bytes."""
    of = getattr(diffusers, kind)
    asked = inspect.signature(of).parameters
    made: dict[str, Any] = {name: None for name, of_it in asked.items() if of_it.default is inspect.Parameter.empty}
    made |= {name: value for name, value in settings.items() if name in asked}
    networks = empty.networks(parts, lambda *_: True)
    encoders = (networks[name] for name in networks if parts[name].is_encoder)
    return of(**made | networks), sum(FP32 * p.numel() for network in encoders for p in network.parameters())


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Shapes of the weights of a network: of each block, with its kind, and of what is beside them."""

    blocks: list[tuple[str, Weights]]
    """The kind is what a configuration calls the number of such blocks."""
    beside: Weights
    models: int = 1
    """Experts that ``blocks`` and ``beside`` are of."""

    @property
    def shapes(self) -> Weights:
        """All of them."""
        return [shape for _, block in self.blocks for shape in block] + self.beside

    @property
    def parameters(self) -> int:
        """Their number."""
        return sum(map(math.prod, self.shapes))

    def depths(self) -> dict[str, int]:
        """Blocks of each kind in one of its models."""
        kinds = [kind for kind, _ in self.blocks]
        return {kind: kinds.count(kind) // self.models for kind in dict.fromkeys(kinds)}

    def largest_block(self) -> int:
        """Parameters of one."""
        return max(sum(map(math.prod, block)) for _, block in self.blocks)


def network_of(teacher: Teacher) -> Network:
    """Of the whole teacher."""
    models = teacher.models
    blocks, beside = [], []
    for model in models:
        within: set[int] = set()
        for kind, name in student.LAYERS[type(model).__name__].items():
            for block in getattr(model, name):
                blocks.append((kind, [p.shape for p in block.parameters()]))
                within |= {id(p) for p in block.parameters()}
        beside += [p.shape for p in model.parameters() if id(p) not in within]
    return Network(blocks, beside, len(models))


def without(network: Network, rho: float) -> Network:
    """What is left when blocks of so much of their parameters are gone, of each kind and expert as large a share."""
    left = []
    for kind in network.depths():
        of_kind = [block for block in network.blocks if block[0] == kind]
        per_model = len(of_kind) // network.models
        gone = min(math.ceil(rho * per_model - 1e-9), per_model - 1) * network.models
        left += of_kind[: len(of_kind) - gone]
    return replace(network, blocks=left)


def one_expert(network: Network) -> Network:
    """Half of two."""
    half = network.depths()
    blocks = [next(b for b in network.blocks if b[0] == kind) for kind, count in half.items() for _ in range(count)]
    return Network(blocks, network.beside[: len(network.beside) // network.models])


def held(shapes: Weights, processes: int) -> int:
    """Numbers that a process has of tensors that lie in parts, rows dealt out evenly and the last ones padded."""
    if processes == 1:
        return sum(map(math.prod, shapes))
    return sum(-(-(shape[0] if shape else 1) // processes) * math.prod(shape[1:]) for shape in shapes)


# --- a call on tensors without values ---------------------------------------------------------------------------------


class Passed(NamedTuple):
    """What calling a network takes, of one process."""

    forward_bytes: float
    """The most at a time, beside the weights."""
    kept_bytes: float
    """Of that, what stays until the way back."""
    backward_bytes: float
    """The most on the way back."""
    forward_flops: float
    flops: float
    """Both ways."""


def _flops_of_flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _flops_of_flash_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_FORMULAS = {
    **flop_registry,
    # On a CPU torch does not count it. It keeps what the GPU's kernels keep: its output, and a number for each row.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _flops_of_flash,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flops_of_flash_backward,
}


class Counting(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, the most that there were, and operations by torch's formulas.

    ``FlopCounterMode`` would keep alive what a block that is computed again makes.
    """

    def __init__(self, known: Sequence[Tensor], unfolding: bool = False) -> None:
        """
        Args:
            known: what is not counted, nor its views.
            unfolding: convolutions in time unfold their input first, as a CPU's do where it has one thread.
        """
        super().__init__()
        self._unfolding = unfolding
        self.now_bytes = self.peak_bytes = self.flops = 0
        self._storages = [tensor.untyped_storage() for tensor in known]
        self._seen = {storage._cdata for storage in self._storages}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (formula := _FORMULAS.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        if self._unfolding and func._overloadpacket is torch.ops.aten.convolution and args[1].ndim == 5:
            unfolded_bytes = made.numel() // made.shape[1] * args[1][0].numel() * made.itemsize
            self.peak_bytes = max(self.peak_bytes, self.now_bytes + unfolded_bytes)
        return made

    def _note(self, storage: Any) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        size_bytes = storage.nbytes()
        self.now_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._gone, storage._cdata, size_bytes)

    def _gone(self, key: int, size_bytes: int) -> None:
        self._seen.discard(key)
        self.now_bytes -= size_bytes


@dataclass
class Calls:
    """Calls of the teacher's network, each made once, as the processes of a run make them."""

    teacher: Teacher
    precision: Literal["float32", "bfloat16"]
    on_cpu: bool
    """Where attention is as `loop.plain_attention` has it: every pair of tokens is kept."""
    rank: int
    """Of the critic's LoRA."""
    _made: dict[Any, Any] = field(default_factory=dict)

    def take(
        self, depths: Mapping[str, float], trained: Trained, clips: int, *, whole: bool, watched: bool = True,
        again: bool = False, head: bool = False, processes: int = 1,
    ) -> Passed:  # fmt: skip
        """A call of one model with so many blocks of each kind, and the way back where something is trained.

        Args:
            trained: which of its weights.
            whole: weights are there in full precision, not gathered block by block in that of the products.
            watched: false where no gradient is wanted this time.
            again: blocks are computed once more on the way back.
            head: the critic's discriminator reads the last tokens.
            processes: that share a clip's tokens; the operations are those of all of them.
        """
        if not whole and clips > 1:  # all of it is of clips then, and none of it of weights
            one = self.take(
                depths, trained, 1, whole=False, watched=watched, again=again, head=head, processes=processes
            )
            return Passed(*(clips * value for value in one))
        if trained == "all" and not watched and not whole:  # nothing is kept of gathered weights
            trained = "nothing"
        watched = watched and trained != "nothing"
        how = (trained, clips, whole, watched, again and watched, head)
        fewest, more = DEPTHS[trained]
        least = dict.fromkeys(depths, fewest)
        first = self._pass(least, *how)
        beside, blocks = list(first), [0.0] * len(first)
        for kind, depth in depths.items():
            for place, value in enumerate(self._pass({**least, kind: more}, *how)):
                beside[place] -= fewest * (value - first[place])
                blocks[place] += depth * (value - first[place])
        if processes == 1:
            return Passed(*map(sum, zip(beside, blocks, strict=True)))
        # What is computed outside the blocks is of all tokens.
        of_all = "all" if trained == "all" and watched else "nothing"
        outside = self._pass(dict.fromkeys(depths, 0), of_all, clips, whole, of_all == "all", False, False)
        bytes_ = (
            min(all_tokens, own) + (max(own - all_tokens, 0) + part) / processes
            for all_tokens, own, part in zip(outside[:3], beside[:3], blocks[:3], strict=True)
        )
        return Passed(*bytes_, *(own + part for own, part in zip(beside[3:], blocks[3:], strict=True)))

    def decoding_bytes(self, clips: int) -> int:
        """The most at a time when so many clips are decoded, the videos themselves with it."""
        key = "decoding", clips
        if key not in self._made:
            teacher, vae = self.teacher, copy.deepcopy(self.teacher.pipe.vae)
            with FakeTensorMode(), torch.no_grad():
                _fake(vae.requires_grad_(False), torch.float32)
                with Counting([*vae.parameters(), *vae.buffers()], unfolding=self.on_cpu) as counting:
                    shape = teacher.backbone.latent_shape(teacher.pipe, teacher.call)
                    teacher.backbone.decode_latents(vae, torch.empty(clips, *shape))
            self._made[key] = counting.peak_bytes
        size_bytes: int = self._made[key]
        return size_bytes

    def adapters(self) -> dict[str, Weights]:
        """Shapes of the LoRA of a block, by kind."""
        key = "adapters"
        if key not in self._made:
            model = self._model(dict.fromkeys(network_of(self.teacher).depths(), 1), "lora")
            self._made[key] = {
                kind: [p.shape for p in getattr(model, name)[0].parameters() if p.requires_grad]
                for kind, name in student.LAYERS[type(model).__name__].items()
            }
        found: dict[str, Weights] = self._made[key]
        return found

    def _pass(self, depths: Mapping[str, int], *how: Any) -> Passed:
        key = (*depths.items(), *how)
        if key not in self._made:
            try:
                self._made[key] = self._passed(depths, False, *how)
            except DynamicOutputShapeException:  # the stock way looks at the values of a mask
                self._made[key] = self._passed(depths, True, *how)
        passed: Passed = self._made[key]
        return passed

    def _passed(
        self, depths: Mapping[str, int], exporting: bool, trained: Trained, clips: int, whole: bool, watched: bool,
        again: bool, head: bool,
    ) -> Passed:  # fmt: skip
        backbone, model = self.teacher.backbone, self._model(depths, trained)
        if again:
            model.enable_gradient_checkpointing(partial(computed_again, attention=self._attention))
        discriminator = heads.token_head(backbone.width(model)).to("meta") if head else None
        reduced = self.precision == "bfloat16"
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Cannot dispatch to fused implementation")
            _fake(model, torch.bfloat16 if reduced and not whole else torch.float32)
            known = [*model.parameters(), *model.buffers()]
            if discriminator is not None:
                _fake(discriminator, torch.float32)
                known += discriminator.parameters()
            counting = Counting(known)
            with counting, torch.set_grad_enabled(watched):
                x_BCTHW, sigma_B, image, text = self._inputs(clips)
                with ExitStack() as stack:
                    if exporting:
                        stack.enter_context(backbone.exporting(model))
                    seen = stack.enter_context(backbone.tokens_after(model, (-1,))) if head else []
                    with torch.autocast("cpu", torch.bfloat16, enabled=reduced), self._attention():
                        velocity = backbone.predict_velocity(model, x_BCTHW, sigma_B, image, text).float()
                logit = discriminator(seen[0].float()).mean() if discriminator is not None else 0.0
                seen.clear()
                forward = counting.peak_bytes, counting.now_bytes, counting.flops
                counting.peak_bytes = counting.now_bytes
                if watched:
                    (velocity.square().mean() + 0 * logit).backward()
                forward_bytes, kept_bytes, forward_flops = forward
                return Passed(forward_bytes, kept_bytes, counting.peak_bytes, forward_flops, counting.flops)

    def _model(self, depths: Mapping[str, int], trained: Trained) -> Any:
        like = self.teacher.models[0]
        settings = {name: value for name, value in like.config.items() if not name.startswith("_")}
        with init_empty_weights():
            model = type(like).from_config({**settings, **depths})
        model.train(trained != "nothing").requires_grad_(trained == "all")
        if trained == "lora":
            with init_empty_weights():
                add_adapter(self.teacher.backbone, model, self.rank)
        return model

    def _inputs(self, clips: int) -> tuple[Tensor, Tensor, Conditions, Conditions]:
        teacher = self.teacher
        shape = teacher.backbone.latent_shape(teacher.pipe, teacher.call)
        image, text = teacher.backbone.condition_shapes(teacher.pipe, teacher.call)

        def made(shapes: Shapes) -> Conditions:
            return {name: torch.empty(clips, *of) for name, of in shapes.items()}

        return torch.empty(clips, *shape), torch.empty(clips), made(image), made(text)

    def _attention(self) -> AbstractContextManager[Any]:
        if not self.on_cpu:
            return nullcontext()
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        return sdpa_kernel(SDPBackend.MATH)


def _fake(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights with neither memory nor values, as if on a CPU; a gradient is let go as soon as it is there."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), parameter.requires_grad)
                module._parameters[name] = fake
                if fake.requires_grad:
                    fake.register_post_accumulate_grad_hook(_let_go)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None
