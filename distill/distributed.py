"""Several processes under `torchrun` that train one network: FSDP2 (Zhao et al. 2023), every tensor of it in parts.

    torchrun --nproc-per-node 8 -m distill run wan2.1-i2v-14b runs/a

Weights, gradients, moments of the optimiser and averages lie in parts, one on each process; a block is gathered while
it runs. All random numbers are drawn for the whole of a batch on every process, which then keeps its own rows. So masks
and the step at which a rollout stops are the same everywhere (or the processes would gather different blocks and wait
for each other for ever), and the losses are those of one process.

A network that is too large for one processor is never whole on one: it is built without memory for its weights (on the
meta device), and each process reads its parts of them from the files. Only to write a file of all its weights does the
first process put them together, in its machine's memory.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distill import student
from distill.backbones.base import Backbone
from distill.backbones.experts import Experts
from distill.config import ConfigError, DistillConfig, FitConfig
from distill.lineage import EXPERTS

PATIENCE = timedelta(hours=4)
"""That a process waits for the others: the first one may be encoding a data set. When one dies torchrun ends all."""
_UNSEEN_S = 180.0
"""That a shared folder may take to show another machine a new file."""

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Share:
    """The rows of a batch that one of several processes works on."""

    number: int = 0
    of: int = 1

    def rows(self, values_B: ValueT) -> ValueT:
        """This process's rows of what was drawn for all; every process has as many."""
        count = len(values_B) // self.of  # type: ignore[arg-type]
        mine: ValueT = values_B[self.number * count : (self.number + 1) * count]  # type: ignore[index]
        return mine


ALL = Share()


class World:
    """The processes of a run. Alone, which is the usual case, nothing here does anything."""

    def __init__(
        self, rank: int = 0, size: int = 1, context: int = 1, mesh: DeviceMesh | None = None, checkpoints: Any = None
    ) -> None:
        """
        Args:
            rank: this process's number.
            size: how many there are.
            context: how many neighbours work on the same clips, each on its part of the tokens.
            mesh: of all of them; its dimensions are ``data``, ``ring`` and ``ulysses``, the last of size ``context``.
            checkpoints: a process group of its own: a checkpoint is written while training goes on, and both talk.
        """
        self.rank = rank
        self.size = size
        self.context = context
        self.mesh = mesh
        self.checkpoints = checkpoints
        self.share = Share(rank // context, size // context)
        self._apart = False

    @cached_property
    def host_mesh(self) -> DeviceMesh:
        """Of all processes, for what waits in their machines' memory."""
        return init_device_mesh("cpu", (self.size,))

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once, and speaks."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether networks lie in parts on several processes."""
        return self.size > 1

    def agreed(self, wanted: bool) -> bool:
        """Whether any process wants it. All of them have to ask."""
        if not self.is_sharded or self._apart:
            return wanted
        return any(self.gathered(wanted))

    def gathered(self, value: ValueT) -> list[ValueT]:
        """The value of every process, in their order."""
        if not self.is_sharded:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def either(self, wanted: list[bool]) -> list[bool]:
        """Of each thing, whether any process wants it."""
        return [any(of) for of in zip(*self.gathered(wanted), strict=True)]

    def said_by_first(self, value: ValueT) -> ValueT:
        """The first process' value. What decides over what all of them do is taken from it: another machine may see a
        shared folder as it was a minute ago."""
        if not self.is_sharded or self._apart:
            return value
        return self._told(value)

    def exists(self, path: Path) -> bool:
        """Whether the first process sees it, and then all of them."""
        there = self.said_by_first(path.exists())
        if there:
            self.wait_for(path)
        return there

    def wait_for(self, *paths: Path) -> None:
        """Until this process sees what the first one has written. Raises ``ConfigError`` where it never does."""
        until = time.monotonic() + _UNSEEN_S
        while not self.is_first and (unseen := [path for path in paths if not path.exists()]):
            if time.monotonic() > until:
                raise ConfigError(f"{unseen[0]} is not seen here: all processes need the same folder")
            os.listdir(unseen[0].parent)  # which some file systems look at anew for it
            time.sleep(0.2)

    def dealt(self, pieces: Sequence[ValueT]) -> Iterator[tuple[int, ValueT, bool]]:
        """This process's of some pieces of work: number, piece, and whether the result counts.

        All have as many, since networks in parts are run by all at once: at the end some do one that another does too.
        """
        for first in range(0, len(pieces), self.share.of):
            turn = first + self.share.number
            number = min(turn, len(pieces) - 1)
            # Neighbours that share a clip's tokens are given the same one, and the first of them has the result.
            yield number, pieces[number], turn == number and self.rank % self.context == 0

    def told_first(self, value: ValueT) -> list[ValueT]:
        """The value of every process, for the first one; none for the others."""
        if not self.is_sharded:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, values)
        return values or []

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The block is run by the first process, and then, when its files are there, by the others.

        What it raises there is raised by all.
        """
        if not self.is_sharded:
            yield
            return
        if self.is_first:
            self._apart = True
            try:
                yield
            except Exception as error:
                self._told(error)
                raise
            finally:
                self._apart = False
            self._told(None)
            return
        if (said := self._told(None)) is not None:
            raise said
        yield

    def _told(self, value: ValueT) -> ValueT:
        """What the first process says."""
        said: list[Any] = [value]
        dist.broadcast_object_list(said, src=0)
        found: ValueT = said[0]
        return found


ALONE = World()


@contextmanager
def joined(context: int = 1) -> Iterator[World]:
    """The processes that `torchrun` started, or this one alone.

    Args:
        context: see ``World``.

    Raises:
        ConfigError: there are more of them on this machine than accelerators, or ``context`` does not divide them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % context:
        raise ConfigError(
            f"context_parallel={context} does not divide the {size} processes: start a multiple of it with torchrun, "
            "or lower it"
        )
    if size == 1:
        yield ALONE
        return
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={size}, and no LOCAL_RANK: start it with --processes or torchrun, or unset it")
    local, kind, backend = int(os.environ["LOCAL_RANK"]), "cpu", "gloo"
    if torch.cuda.is_available():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        if here > torch.cuda.device_count():  # of all of them, or the first one would wait for the others
            raise ConfigError(
                f"{here} processes were started here, and there are {torch.cuda.device_count()} GPUs: "
                "give --processes (of torchrun: --nproc-per-node) so many"
            )
        torch.cuda.set_device(local)
        kind, backend = "cuda", "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    shape = (size // context, 1, context)  # as diffusers calls the last two
    mesh = init_device_mesh(kind, shape, mesh_dim_names=("data", "ring", "ulysses"))
    checkpoints = dist.new_group(backend="gloo", timeout=PATIENCE)
    yield World(dist.get_rank(), size, context, mesh, checkpoints)
    # All of them do so together, with NCCL. One that has failed alone has to end, or the others would not be ended.
    dist.destroy_process_group()


def check(config: DistillConfig, world: World) -> None:
    """Whether the batches can be shared by the processes.

    Raises:
        ConfigError: they cannot; the message says which would be as large.
    """
    for stage, fit in (("pruning", config.pruning.fit), ("matching", config.matching.fit)):
        if fit.batch % world.share.of:
            raise ConfigError(_shared_otherwise(stage, fit, world.share.of))
    optimisers = {"pruning.fit": config.pruning.fit, "matching.fit": config.matching.fit,
                  "matching.critic": config.matching.critic}  # fmt: skip
    for name, settings in optimisers.items():
        if world.is_sharded and settings.optimiser == "muon":
            raise ConfigError(
                f"{name}.optimiser=muon works on whole matrices, and {world.size} processes hold parts of them: "
                f"set {name}.optimiser=adamw"
            )
    if world.context > 1 and config.matching.gan.student_weight > 0:
        raise ConfigError(
            f"context_parallel={world.context}: the discriminator has to see all tokens of a clip; set "
            "context_parallel=1, or matching.gan.student_weight=0"
        )


def _shared_otherwise(stage: str, fit: FitConfig, processes: int) -> str:
    clips = fit.batch * fit.accumulate
    parts = [count for count in range(processes, clips + 1, processes) if clips % count == 0]
    hint = f"so that {processes} divides {stage}.fit.batch"
    if parts:
        best = min(parts, key=lambda count: abs(count - fit.batch))
        hint = f"{stage}.fit.batch={best} and {stage}.fit.accumulate={clips // best}, as many clips an update"
    return f"{stage}.fit.batch={fit.batch} cannot be shared by {processes} processes: set {hint}"


# --- networks in parts ----------------------------------------------------------------------------------------------


def without_blocks(backbone: Backbone, network: Any, pruned: Collection[int]) -> Any:
    """`Backbone.without_blocks` of an empty network."""
    with init_empty_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*")
        smaller = backbone.without_blocks(network, pruned)
    _set_buffers(smaller, dict(network.named_buffers()))  # they are computed and in no file
    return smaller


class Stored:
    """Weights that lie in files, by the name that each has in the network."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]) -> None:
        self._places = places

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> Tensor:
        path, key = self._places[name]
        with safe_open(path, framework="pt") as tensors:
            weight: Tensor = tensors.get_tensor(key)
        return weight

    @classmethod
    def of_model(cls, folder: Path) -> Stored:
        """Of a pipeline's denoisers."""
        components = [c for c in EXPERTS if (folder / c / "config.json").exists()]
        places: dict[str, tuple[Path, str]] = {}
        for component in components:
            prefix = EXPERTS[component] if len(components) > 1 else ""
            for path in student.weight_files(folder / component):
                with safe_open(path, framework="pt") as tensors:
                    places |= {prefix + key: (path, key) for key in tensors.keys()}
        return cls(places)

    @classmethod
    def of_file(cls, path: Path) -> Stored:
        """Of what a stage left."""
        with safe_open(path, framework="pt") as tensors:
            return cls({key: (path, key) for key in tensors.keys()})

    def renamed(self, names: Mapping[str, str]) -> Stored:
        """By other names: each new one with the one that it stands for."""
        return Stored({new: self._places[old] for new, old in names.items() if old in self._places})


def names_in(smaller: Any, of: Any, blocks: list[tuple[Any, Any]], whole: Any) -> dict[str, str]:
    """What the weights of a network are called in the one that it is a part of.

    Args:
        of: the part of ``whole`` that it has fewer blocks than.
        blocks: each of its blocks with the one that it is there.
    """
    there = {id(module): name for name, module in whole.named_modules()}
    here = {id(module): name for name, module in smaller.named_modules()}
    pairs = {f"{here[id(mine)]}.": f"{there[id(other)]}." for mine, other in blocks}
    rest = f"{there[id(of)]}." if of is not whole else ""
    names = {}
    for name, _ in smaller.named_parameters():
        prefix = next((prefix for prefix in pairs if name.startswith(prefix)), "")
        names[name] = pairs.get(prefix, rest) + name.removeprefix(prefix)
    return names


def spread(
    world: World, backbone: Backbone, network: Any, weights: Stored, device: torch.device, config: DistillConfig,
    shape: tuple[int, ...], fresh: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Give an empty network its weights, each process its part of them; in place.

    What is trained is held in fp32, and what is frozen in the precision that it computes in; blocks are gathered in
    that precision, and gradients are summed in fp32.

    Args:
        weights: by name.
        shape: of one clip's latents: C, T, H, W.
        fresh: weights that are in no file, by name.
    """
    # The stock models return views, and nobody changes those in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    fresh, buffers = fresh or {}, {name: b.to(device) for name, b in network.named_buffers()}
    network.to("meta")
    reduced = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    for parameter in network.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(reduced)
    # The inputs stay as they are: noise levels in bf16 are other ones. Autocast looks after the products.
    policy = MixedPrecisionPolicy(
        param_dtype=None if reduced == torch.float32 else reduced, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    assert world.mesh is not None
    if world.context > 1:
        backbone.split_sequence(network, world.mesh["ring", "ulysses"], shape)
    mesh = _in_one_dimension(world.mesh)
    for part in (*backbone.blocks(network), *backbone.networks(network).values()):
        # A root would stay gathered, and not see when its weights change places with the averaged ones.
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    network.to_empty(device=device)
    _set_buffers(network, buffers)
    if isinstance(network, Experts):
        network.both_asked = world.either
    fill(network, weights, fresh)


def materialise(network: Any, weights: Stored) -> None:
    """Give an empty network its weights, all of them, on the CPU; in place."""
    buffers = dict(network.named_buffers())
    network.to_empty(device="cpu")
    _set_buffers(network, buffers)
    fill(network, weights)


@torch.no_grad()
def fill(network: Any, weights: Stored, fresh: Mapping[str, Tensor] | None = None) -> None:
    """Read the weights of a network, whole or in parts. Raises ``KeyError`` where one of them is nowhere."""
    fresh = fresh or {}
    for name, parameter in network.named_parameters():
        stored = name.replace(".base_layer.", ".")  # as a layer with an adapter calls its own
        value = fresh[name] if name in fresh else weights[stored]
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):  # each process has read all of it, and keeps its part
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)


def spread_whole(world: World, module: nn.Module, device: torch.device) -> None:
    """A small module that has its weights, the same on every process, into parts; in place."""
    assert world.mesh is not None
    module.to(device)
    fully_shard(module, mesh=_in_one_dimension(world.mesh), reshard_after_forward=True)


def _in_one_dimension(mesh: DeviceMesh) -> DeviceMesh:
    """Weights lie in parts on all processes, those that share clips too."""
    return mesh._flatten("all")


def save(network: nn.Module, path: Path, world: World) -> None:
    """Write a network's weights as one file, aside and renamed, by the first process; on return it is there for all."""
    aside = path.with_suffix(".tmp")
    if not world.is_sharded:
        save_model(network, str(aside))
        os.replace(aside, path)
        return
    weights = {}
    for name, parameter in network.named_parameters():
        tensor = parameter.detach()
        value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # all of them have to take part
        if world.is_first:
            weights[name] = value.to("cpu", copy=True).contiguous()
        del value
    with world.first_alone():
        if world.is_first:
            save_file(weights, aside)
            os.replace(aside, path)
    world.wait_for(path)


def load(network: nn.Module, path: Path) -> None:
    """Read what ``save`` wrote."""
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        fill(network, Stored.of_file(path))
    else:
        load_model(network, path)


def on_host(tensor: Tensor, world: World) -> Tensor:
    """A copy in the machine's memory; of a tensor in parts each process has its own."""
    copied = local(tensor.detach()).to("cpu", copy=True)
    if not isinstance(tensor, DTensor):
        return copied
    return DTensor.from_local(
        copied, world.host_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is here: a view of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _set_buffers(network: Any, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        parent, _, last = name.rpartition(".")
        network.get_submodule(parent)._buffers[last] = buffer
