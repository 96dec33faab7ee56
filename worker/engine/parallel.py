"""One video on several devices of one machine: diffusers' context parallelism, with the worker as one of the processes.

The worker takes the jobs. For every further device it starts a *follower*, a process with a copy of the transformer.
At each call of the transformer all of them get the same inputs and each computes its share of the tokens; they exchange
heads in self-attention (Ulysses), and the last layer's output is put together again. diffusers' own plan for Wan splits
the per-token timesteps of Wan2.2-TI2V and the rotary embedding together with the tokens, so it is used as it is.

What a call brings is announced through a pipe, and only the tensors go through `torch.distributed`: a follower may wait
for days for a job, and the time limit that keeps a call from waiting forever for a follower would end that wait too.
Through the pipe the followers also learn that the worker is gone, however it ended.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from torch import Tensor

from worker.engine.base import Engine
from worker.engine.errors import EngineError, EngineLost

LOAD_TIMEOUT_S = 900.0
"""For a follower to start and to read the transformer."""


class FollowerLost(EngineLost):
    """One of the processes that share the videos is gone, or does not answer."""


@dataclass(frozen=True)
class _Member:
    """One of the processes that share a video."""

    rank: int
    """0 is the worker."""
    world_size: int
    device_type: str
    port: int
    """On 127.0.0.1, where they find each other."""
    timeout_s: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.device_type == "cpu" else torch.device(self.device_type, self.rank)


class ParallelEngine(Engine):
    """The transformer on the first device, with followers on the next ones."""

    def __init__(
        self, transformer: Any, folder: Path, *, world_size: int, threads: int = 1, timeout_s: float = 60.0
    ) -> None:
        """Start the followers and wait until they have loaded. One at a time in a process: close it before the next.

        Args:
            transformer: a diffusers transformer on the CPU or on the first GPU. From now on it can be called only
                through this engine.
            folder: the transformer's own, for the followers to read.
            world_size: number of devices, 2 or more.
            threads: of torch in each follower, on the CPU.
            timeout_s: that one process waits for another within a call. What they compute between two exchanges (a
                block of the network) has to take a small part of it.

        Raises:
            EngineError: there are too few GPUs, the transformer cannot be shared so, or a follower did not start.
        """
        super().__init__(transformer.config, transformer.dtype, transformer.device)
        self.transformer = transformer
        self.world_size = world_size
        self.name = f"eager-{self.device.type}-x{world_size}"
        self._check()
        self._in_step = False
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        atexit.register(self.close)  # multiprocessing waits at exit for its processes, and these for the pipe
        # Opened here, because a TCPStore that opens its port itself listens on all of the machine's addresses.
        listener = socket.create_server(("127.0.0.1", 0))
        me = _Member(0, world_size, self.device.type, listener.getsockname()[1], timeout_s)
        store = _store(me, listener.detach())
        spawn = multiprocessing.get_context("spawn")
        try:
            for rank in range(1, world_size):
                here, there = spawn.Pipe()
                process = spawn.Process(
                    target=_follow,
                    args=(there, replace(me, rank=rank), type(transformer), folder, self.dtype, threads),
                    name=f"follower {rank}",
                    daemon=True,
                )
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)
            for pipe in self._pipes:
                if not pipe.poll(LOAD_TIMEOUT_S):
                    raise TimeoutError(f"the transformer was not loaded after {LOAD_TIMEOUT_S:.0f} s")
                if said := pipe.recv():
                    raise ChildProcessError(said)
            _join(transformer, me, store)
        except (EOFError, OSError, RuntimeError) as error:
            problem = str(error) if isinstance(error, ChildProcessError) else self._problem(error)
            self.close()
            raise EngineError(f"{world_size} devices cannot share a video: {problem}; or use one device") from error
        self._in_step = True

    def _check(self) -> None:
        if dist.is_initialized():
            raise EngineError(f"{self.world_size} devices share another model in this process; start the worker anew")
        kind, heads = type(self.transformer).__name__, self.config.num_attention_heads
        wanted = f"{self.world_size} devices were wanted for one video"
        if self.world_size < 2:
            raise EngineError(f"{wanted}; this engine is for 2 or more, so use another one")
        if getattr(self.transformer, "_cp_plan", None) is None:
            raise EngineError(f"{wanted}, and diffusers has no plan how to share {kind}; use one device")
        registries = (getattr(module, "_diffusers_hook", None) for module in self.transformer.modules())
        if any(registry.hooks for registry in registries if registry is not None):
            # The followers read the weights as they are, and offload's hooks do not bear with those that split tokens.
            raise EngineError(f"{wanted}, and {kind} is offloaded or cast already; set OFFLOAD=none and CASTING=none")
        if heads % self.world_size:
            raise EngineError(f"{wanted}, and {kind} has {heads} attention heads; use {_choices(heads)} devices")
        if self.device.type == "cuda" and (count := torch.cuda.device_count()) < self.world_size:
            raise EngineError(
                f"{wanted}, and {count} GPUs can be seen; use at most {count}, or let CUDA_VISIBLE_DEVICES show more"
            )

    @torch.no_grad()
    def infer(self, inputs: dict[str, Tensor]) -> Tensor:
        """See ``Engine``.

        Raises:
            EngineError: this size of video cannot be shared evenly. Other calls can still be made.
            FollowerLost: ``timeout_s`` after a follower was last heard of, or earlier.
        """
        if not self._in_step:
            raise FollowerLost(self._message("an earlier call was not finished"))
        patches = zip(inputs["hidden_states"].shape[2:], self.config.patch_size, strict=True)
        num_tokens = math.prod(size // patch for size, patch in patches)
        if num_tokens % self.world_size:
            choices = _choices(math.gcd(num_tokens, self.config.num_attention_heads))
            raise EngineError(
                f"a video of this size has {num_tokens} tokens, which {self.world_size} devices cannot share evenly; "
                f"use {choices} devices, or another size"
            )
        self._in_step = False  # whatever ends this call early leaves the followers in the middle of it
        try:
            for pipe in self._pipes:
                pipe.send({name: (value.shape, value.dtype) for name, value in inputs.items()})
            for value in inputs.values():
                dist.broadcast(value.contiguous(), src=0)
            output: Tensor = self.transformer(**inputs, return_dict=False)[0]
        except (OSError, RuntimeError) as error:
            raise FollowerLost(self._message(self._problem(error))) from error
        self._in_step = True
        return output

    def close(self) -> None:
        """End the followers and leave the process group. Nothing is left of them; safe to call twice."""
        atexit.unregister(self.close)
        for pipe in self._pipes:
            pipe.close()
        if not self._in_step:
            for process in self._processes:
                process.kill()  # in the middle of a call it may wait for one that is gone
        # NCCL, too, may wait here for one that is gone. The worker has to end then anyway.
        if dist.is_initialized() and (self._in_step or self.device.type == "cpu"):
            dist.destroy_process_group()
        for process in self._processes:
            process.join(10)
            process.kill()
            process.join()
        self._pipes, self._processes, self._in_step = [], [], False

    def _message(self, problem: str) -> str:
        return f"{self.world_size} processes share each video, and {problem}; start the worker anew, or use one device"

    def _problem(self, error: Exception) -> str:
        """How a follower ended or, where all are running, what they say; else what was met here."""
        ended, said = [], []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            words = None
            with suppress(EOFError, OSError):
                while pipe.poll(1.0):
                    words = pipe.recv() or words
            process.join(1.0)
            if words:
                said.append(f"{process.name} said: {words}")
            elif process.exitcode is not None:
                ended.append(f"{process.name} (process {process.pid}) ended with exit code {process.exitcode}")
        met = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return [*ended, *said, f"a follower did not do its part ({met})"][0]


def _choices(shared: int) -> str:
    """Numbers of devices that divide ``shared``, for a person."""
    return " or ".join(str(n) for n in range(1, shared + 1) if shared % n == 0)


def _follow(pipe: Connection, me: _Member, kind: type[Any], folder: Path, dtype: torch.dtype, threads: int) -> None:
    """What a follower does: take part in every call that is announced, until the worker's end of the pipe is closed."""
    # Ctrl-C and a supervisor's SIGTERM may reach the whole group; the worker finishes its job first, and with it this.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    try:
        transformer = kind.from_pretrained(folder, dtype=dtype, local_files_only=True).to(me.device)
        pipe.send(None)
        _join(transformer, me, _store(me))
        while True:
            announced: dict[str, tuple[torch.Size, torch.dtype]] = pipe.recv()
            inputs = {
                name: torch.empty(shape, dtype=dtype, device=me.device) for name, (shape, dtype) in announced.items()
            }
            for value in inputs.values():
                dist.broadcast(value, src=0)
            with torch.no_grad():
                transformer(**inputs, return_dict=False)
    except EOFError:
        dist.destroy_process_group()
    except Exception as error:
        with suppress(OSError):
            pipe.send(traceback.format_exception_only(error)[-1].strip())
        raise


def _store(me: _Member, listener: int | None = None) -> Any:
    """Where the processes find each other. ``listener``: descriptor of the open port, in the worker."""
    return dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it without saying so
        "127.0.0.1",
        me.port,
        me.world_size,
        is_master=listener is not None,
        timeout=timedelta(seconds=me.timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def _join(transformer: Any, me: _Member, store: Any) -> None:
    """Enter the process group and let diffusers split the transformer over it. In all processes at once."""
    if me.device_type == "cuda":
        torch.cuda.set_device(me.device)
        # Or NCCL does not wait in the caller, and where a partner is gone it ends the process instead of the call.
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    else:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    warnings.filterwarnings("ignore", ".*all_gather_tensor", FutureWarning)  # diffusers 0.42 calls it in every forward
    dist.init_process_group(
        "nccl" if me.device_type == "cuda" else "gloo",
        store=store,
        rank=me.rank,
        world_size=me.world_size,
        timeout=timedelta(seconds=me.timeout_s),
    )
    # Ulysses and not ring, which does not take PyTorch's own attention. With one dimension of the mesh as large as the
    # world, all exchanges go through the default group, and so have its time limit.
    config = diffusers.ContextParallelConfig(ulysses_degree=me.world_size)
    if me.device_type == "cpu":
        transformer._resolve_parallel_config = _resolve_on_cpu(transformer, me)
    transformer.enable_parallelism(config=config)


def _resolve_on_cpu(transformer: Any, me: _Member) -> Callable[[Any], Any]:
    """For the step of `enable_parallelism` that takes the rank modulo the number of accelerators (diffusers 0.42.1)."""

    def resolve(config: Any) -> Any:
        mesh = dist.device_mesh.init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
        resolved = diffusers.ParallelConfig(context_parallel_config=config)
        resolved.setup(me.rank, me.world_size, me.device, mesh=mesh)
        transformer._parallel_config = resolved
        return resolved

    return resolve
