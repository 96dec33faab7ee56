"""TensorRT on a GPU: the bundled student's plan is loaded, computes what PyTorch computes, and takes other weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.worker import tiny
from worker.engine import choice, trt
from worker.engine.cache import Cache
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineError
from worker.pipeline import Options, VideoPipeline
from worker.settings import MODELS_DIR, Settings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DIMS = {"frames": 5, "rows": 8, "columns": 8}
TOLERANCE = trt.TOLERANCES[torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", autouse=True)
def _usable():
    try:
        name = trt.module().__name__
    except EngineError as error:
        pytest.skip(str(error))
    major, minor = torch.cuda.get_device_capability()
    if name == "tensorrt_rtx" and f"SM{major}{minor}" not in trt.module().ComputeCapability.__members__:
        pytest.skip(f"tensorrt_rtx does not name compute capability {major}.{minor}; install tensorrt")


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return Cache(tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def student():
    return tiny.student(torch.bfloat16).to("cuda")


@pytest.fixture(scope="module")
def other(student):
    return tiny.perturbed(student)


@pytest.fixture(scope="module")
def engine(student, kept):
    with torch.no_grad():
        made = trt.make(tiny.model(student, **DIMS), kept)
    assert student.device.type == "cpu"  # its memory is the engine's now
    student.to("cuda")
    return made


@pytest.fixture
def no_build(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("built")

    monkeypatch.setattr(trt, "build", refuse)


def inputs(model, seed=0, sigma=0.9375, **dims):
    given = tiny.inputs(model, **(dims or DIMS))
    generator = torch.Generator().manual_seed(seed)
    given["hidden_states"] = torch.randn(given["hidden_states"].shape, generator=generator).to(model.dtype)
    given["timestep"] *= sigma / 0.9375
    return {name: value.to("cuda") for name, value in given.items()}


def difference(got, wanted):
    """As a share of the largest value."""
    return ((got.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()


def test_it_is_called_like_the_transformer_and_gives_its_output(engine, student):
    for seed, sigma in enumerate((1.0, 0.9375, 0.8333, 0.625)):
        given = inputs(student, seed, sigma)
        (got,) = engine(**given, attention_kwargs=None, return_dict=False)
        (wanted,) = student(**given, return_dict=False)
        assert (got.shape, got.dtype, got.device) == (wanted.shape, wanted.dtype, wanted.device)
        assert difference(got, wanted) <= TOLERANCE
    assert engine.name in ("trt-cuda", "trt-rtx-cuda")
    assert engine.config is student.config


def test_what_it_is_given_and_gives_may_be_in_the_making(engine, student):
    """No synchronisation: it has to wait for its inputs, and its memory must not be given away too early."""
    wanted, got = [], []
    for seed in range(20):
        given = inputs(student, seed)
        wanted.append(engine.infer(given))
        torch.cuda.synchronize()
    for seed in range(20):
        noise = torch.empty(4096, 4096, device="cuda").normal_()
        given = inputs(student, seed)
        given["hidden_states"] = given["hidden_states"] + 0 * (noise @ noise)[0, 0].to(student.dtype)
        got.append(engine.infer(given))
        del given, noise
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))


@pytest.mark.usefixtures("no_build", "engine")
def test_a_second_start_builds_nothing(student, kept):
    again = trt.make(tiny.model(student, **DIMS), kept)
    student.to("cuda")
    given = inputs(student)
    assert difference(again.infer(given), EagerEngine(student).infer(given)) <= TOLERANCE


@pytest.mark.usefixtures("no_build", "engine")
def test_another_students_weights_go_into_the_plan_that_is_there(student, other, kept):
    refitted = trt.make(tiny.model(other, "two", **DIMS), kept)
    other.to("cuda")
    given = inputs(student)
    got = refitted.infer(given)
    assert difference(got, EagerEngine(other).infer(given)) <= TOLERANCE
    assert difference(got, EagerEngine(student).infer(given)) > 2 * TOLERANCE


@pytest.mark.slow
def test_every_parameter_of_a_block_can_be_replaced_and_counts(engine, student):
    """A refit that loses one parameter is within the tolerance of a comparison; so they are changed one at a time."""
    given, weights = inputs(student), student.state_dict()
    before = engine.infer(given)
    names = [name for name in weights if name.startswith(("blocks.3.", "proj_out", "scale_shift", "patch_embedding"))]
    assert len(names) > 25
    try:
        for name in names:
            weight = weights[name]  # changed so that rounding stays what it was
            changed = {**weights, name: weight * 1.5 + 0.5 if weight.ndim == 1 else weight.flip(-1)}
            engine.refit(changed, lambda _second: None)
            got = engine.infer(given)
            assert not torch.equal(got, before), name
            wanted = torch.func.functional_call(student, changed, kwargs={**given, "return_dict": False})[0]
            assert difference(got, wanted) <= TOLERANCE, name
    finally:
        engine.refit(weights, lambda _second: None)
    assert torch.equal(engine.infer(given), before)


def test_a_refit_that_fails_leaves_the_old_weights_in_service(engine, student, other):
    given = inputs(student)
    before = engine.infer(given)

    def check(second):
        assert not torch.equal(second.infer(given), before)
        choice.check_parity(second, EagerEngine(student), given, TOLERANCE)

    with pytest.raises(EngineError, match="differs from PyTorch"):
        engine.refit(other.state_dict(), check)
    assert torch.equal(engine.infer(given), before)
    weights = other.state_dict()
    del weights["blocks.0.ffn.net.2.bias"]
    with pytest.raises(EngineError, match=r"weights are missing for blocks\.0\.ffn\.net\.2\.bias"):
        engine.refit(weights, check)
    assert torch.equal(engine.infer(given), before)


def test_inputs_that_it_was_not_built_for_are_refused(engine, student):
    given = inputs(student)
    before = engine.infer(given)
    with pytest.raises(EngineError, match=r"hidden_states is \(1, 24, 3, 8, 8\); this plan takes"):
        engine.infer(inputs(student, frames=3, rows=8, columns=8))
    with pytest.raises(EngineError, match=r"hidden_states is torch\.float32 .* want torch\.bfloat16"):
        engine.infer({**given, "hidden_states": given["hidden_states"].float()})
    with pytest.raises(EngineError, match=r"the plan's tensors are .*timestep"):
        engine.infer({name: value for name, value in given.items() if name != "timestep"})
    assert torch.equal(engine.infer(given), before)


def test_one_plan_for_several_sizes_and_clips(student, kept):
    sizes = [tiny.shapes(inputs(student, frames=5, rows=12, columns=8))]
    sizes.append({name: (2, *shape[1:]) for name, shape in sizes[0].items()})
    made = trt.make(tiny.model(student, **DIMS), kept, sizes)
    student.to("cuda")
    for rows, clips in ((8, 1), (12, 1), (12, 2), (8, 2)):
        given = inputs(student, frames=5, rows=rows, columns=8)
        given = {name: torch.cat([value, value.flip(1)])[:clips] for name, value in given.items()}
        assert difference(made.infer(given), EagerEngine(student).infer(given)) <= TOLERANCE


def test_the_pipeline_makes_pytorchs_video(tmp_path):
    videos = {}
    image = Image.open(MODELS_DIR / "examples" / "red-circle.png").convert("RGB")
    for kind in ("eager", "trt"):
        settings = Settings(device="cuda", engine=kind, compile="off", engines=tmp_path, model="shapes-4step")
        pipeline = VideoPipeline(MODELS_DIR / "shapes-4step", Options.of(settings))
        prompt = "a red circle moves right quickly, static camera"
        videos[kind] = pipeline(image, prompt, seed=1).frames_THWC.astype(float)
    error = np.mean((videos["trt"] - videos["eager"]) ** 2)
    assert 10 * np.log10(255**2 / max(error, 1e-9)) >= 32
