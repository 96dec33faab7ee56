"""One video in two real processes on the CPU: the same output as one process, an end in bounded time, nothing left."""

import os
import signal
import subprocess
import sys
import time

import diffusers
import psutil
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from distill import student
from distill.backbones import wan
from tests.stack import ROOT, wait_for
from worker.engine import memory
from worker.engine.errors import EngineError
from worker.engine.parallel import FollowerLost, ParallelEngine
from worker.settings import MODELS_DIR

FOLDER = MODELS_DIR / "shapes-4step"
TIMEOUT_S = 5.0

# diffusers 0.42 calls it; the engine hides the warning in the worker's log, and pytest sets the filters anew.
pytestmark = pytest.mark.filterwarnings("ignore:.*all_gather_tensor:FutureWarning")


def load():
    return diffusers.WanTransformer3DModel.from_pretrained(
        FOLDER / "transformer", dtype=torch.float32, local_files_only=True
    )


def start(**settings) -> ParallelEngine:
    return ParallelEngine(load(), FOLDER / "transformer", world_size=2, **{"timeout_s": TIMEOUT_S, **settings})


def draw(height: int = 8, width: int = 8, clips: int = 2) -> dict[str, torch.Tensor]:
    """Inputs of the transformer; every token is told a noise level of its own."""
    noise = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(clips, 24, 5, height, width, generator=noise),
        "timestep": 1000 * torch.rand(clips, 5 * height * width // 4, generator=noise),
        "encoder_hidden_states": torch.randn(clips, 32, 128, generator=noise),
    }


def followers() -> list[psutil.Process]:
    """Spawned Python processes of this one; multiprocessing's tracker of resources is none of them."""
    return [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


@pytest.fixture(scope="module")
def alone():
    return load()


@pytest.fixture(scope="class")
def engine():
    """For a class only: a process can be in one group at a time, and other tests start their own."""
    engine = start()
    yield engine
    engine.close()


class TestTogether:
    @torch.no_grad()
    def test_two_processes_compute_what_one_does(self, engine, alone):
        for inputs in (draw(), draw(height=4, width=12, clips=1)):
            [wanted] = alone(**inputs, return_dict=False)
            [got] = engine(**inputs, return_dict=False)
            assert got.shape == wanted.shape
            assert (got - wanted).abs().max() <= 1e-5
        assert engine.name == "eager-cpu-x2"
        assert len(followers()) == 1

    @torch.no_grad()
    def test_so_does_one_noise_level_for_each_clip(self, engine, alone):
        inputs = draw() | {"timestep": torch.tensor([300.0, 900.0])}
        [wanted] = alone(**inputs, return_dict=False)
        assert (engine(**inputs, return_dict=False)[0] - wanted).abs().max() <= 1e-5

    @torch.no_grad()
    def test_it_stands_for_the_transformer_in_a_pipeline(self, engine, alone, example_image):
        diffusers.utils.logging.disable_progress_bar()
        pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        card = student.read_card(FOLDER)
        with Image.open(example_image) as opened:
            image = opened.convert("RGB")
        latents = []
        for transformer in (alone, engine):
            pipe.transformer = transformer
            noise = torch.Generator().manual_seed(1)
            made = pipe(image, card.prompt.examples[0], generator=noise, output_type="latent", **card.call)
            latents.append(made.frames)
        assert (latents[1] - latents[0]).abs().max() <= 1e-4  # after four steps
        assert wan.decode_latents(pipe.vae, latents[1]).shape == (1, 3, 17, 64, 64)

    @pytest.mark.slow
    @torch.no_grad()
    def test_followers_wait_longer_for_a_job_than_for_each_other(self, engine, alone):
        inputs = draw()
        time.sleep(TIMEOUT_S + 1)
        [wanted] = alone(**inputs, return_dict=False)
        assert (engine(**inputs, return_dict=False)[0] - wanted).abs().max() <= 1e-5

    def test_a_size_that_cannot_be_shared_is_refused_and_others_still_work(self, engine):
        with pytest.raises(EngineError, match="45 tokens, which 2 devices cannot share evenly; use 1 devices"):
            engine(**draw(height=6, width=6), return_dict=False)
        engine(**draw(), return_dict=False)


def test_a_follower_that_is_killed_ends_the_call_with_an_error():
    engine = start(timeout_s=60.0)
    try:
        engine(**draw(), return_dict=False)
        [follower] = followers()
        follower.kill()
        began = time.monotonic()
        with pytest.raises(FollowerLost, match=rf"process {follower.pid}\) ended with exit code -9; start the worker"):
            engine(**draw(), return_dict=False)
        with pytest.raises(FollowerLost, match="an earlier call was not finished"):
            engine(**draw(), return_dict=False)
        assert time.monotonic() - began < 30
    finally:
        engine.close()
    assert not followers()
    assert not dist.is_initialized()
    engine.close()


@pytest.mark.slow
def test_a_follower_that_does_not_answer_is_waited_for_until_the_limit():
    engine = start()
    try:
        engine(**draw(), return_dict=False)
        [follower] = followers()
        follower.suspend()
        began = time.monotonic()
        with pytest.raises(FollowerLost, match=r"a follower did not do its part .*Timed out waiting"):
            engine(**draw(), return_dict=False)
        assert TIMEOUT_S - 1 < time.monotonic() - began < TIMEOUT_S + 10
    finally:
        engine.close()
    assert not followers()
    assert not dist.is_initialized()


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_its_followers_along():
    code = """if __name__ == "__main__":
        import sys, time
        from tests.worker import test_parallel
        engine = test_parallel.start()
        engine(**test_parallel.draw(), return_dict=False)
        print(*(p.pid for p in test_parallel.followers()), flush=True)
        time.sleep(600)"""
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        [pid] = [int(word) for word in worker.stdout.readline().split()]
        assert psutil.pid_exists(pid)
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    wait_for(lambda: not psutil.pid_exists(pid), 20, "the follower to end")


@pytest.mark.slow
def test_a_follower_that_cannot_load_is_an_error_at_the_start(tmp_path):
    with pytest.raises(EngineError, match=rf"2 devices cannot share a video: OSError.*{tmp_path}.*or use one device"):
        ParallelEngine(load(), tmp_path, world_size=2)
    assert not followers()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("world_size", "problem"),
    [
        pytest.param(1, "1 devices were wanted for one video; this engine is for 2 or more", id="one"),
        pytest.param(3, "has 4 attention heads; use 1 or 2 or 4 devices", id="heads"),
    ],
)
def test_a_number_of_devices_that_does_not_fit_is_refused(alone, world_size, problem):
    with pytest.raises(EngineError, match=problem):
        ParallelEngine(alone, FOLDER / "transformer", world_size=world_size)


def test_a_network_without_a_plan_is_refused():
    hunyuan = diffusers.HunyuanVideoTransformer3DModel(
        num_attention_heads=2, num_layers=1, num_single_layers=1, attention_head_dim=12, rope_axes_dim=(4, 4, 4)
    )
    with pytest.raises(EngineError, match="diffusers has no plan how to share HunyuanVideoTransformer3DModel"):
        ParallelEngine(hunyuan, FOLDER / "transformer", world_size=2)


def test_a_transformer_in_less_memory_is_refused():
    transformer = load()
    memory.cast(transformer)
    with pytest.raises(EngineError, match="is offloaded or cast already; set OFFLOAD=none and CASTING=none"):
        ParallelEngine(transformer, FOLDER / "transformer", world_size=2)
