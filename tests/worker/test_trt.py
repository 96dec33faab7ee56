"""TensorRT without a GPU: real plans of real graphs, what is refused, and when a plan is built, found or refitted.

Only `tensorrt_rtx` builds here. What needs a GPU is in tests/gpu.
"""

import json
import logging
import shutil
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from tests.worker import tiny
from worker.engine import export, trt
from worker.engine.base import Engine
from worker.engine.cache import Cache
from worker.engine.errors import EngineError
from worker.engine.ort import Session

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _rtx(monkeypatch):
    """Where both are installed, the one that needs no GPU to build."""
    monkeypatch.setattr(trt, "module", lambda: tensorrt_rtx)


@pytest.fixture(scope="module")
def small():
    return tiny.transformer()


@pytest.fixture(scope="module")
def graph(small, tmp_path_factory):
    return tiny.exported(small, tmp_path_factory.mktemp("small") / "graph.onnx")


@pytest.fixture
def sizes(small):
    return [tiny.shapes(tiny.inputs(small))]


def weight_bytes(model):
    return sum(parameter.nbytes for parameter in model.parameters())


# --- building --------------------------------------------------------------------------------------------------------

DIMS = {"frames": 5, "rows": 8, "columns": 8}


def test_a_plan_of_the_bundled_student(tmp_path, caplog):
    """In fp16, for its own size of video."""
    student = tiny.student(torch.float16)
    inputs = tiny.inputs(student, **DIMS)
    path = tiny.exported(student, tmp_path / "graph.onnx", inputs)
    with caplog.at_level(logging.INFO, logger=trt.__name__):
        plan = trt.build(path, [tiny.shapes(inputs)], limit_bytes=100_000_000)
    assert weight_bytes(student) < plan.nbytes < 4 * weight_bytes(student)
    (tmp_path / "model.plan").write_bytes(plan)
    assert (tmp_path / "model.plan").stat().st_size == plan.nbytes
    said = [record.message for record in caplog.records if record.name == trt.__name__]
    assert said[0] == "TensorRT: Building engine"
    assert said[-1].startswith("graph.onnx: built in")
    # TensorRT knows every parameter by its name. More than that needs a GPU.
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="a plan that takes other weights needs a GPU to build"):
            trt.build(path, [tiny.shapes(inputs)], refittable=student.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_plan_for_several_sizes(dtype, tmp_path):
    """Landscape, portrait and longer in one: not every mixture of their shapes makes sense, and that is no error."""
    student = tiny.student(dtype)
    inputs = tiny.inputs(student, **DIMS)
    axes = {"hidden_states": (2, 3, 4), "timestep": (1,)}
    path = tiny.exported(student, tmp_path / "graph.onnx", inputs, axes)
    wide, high, long = (tiny.shapes(tiny.inputs(student, *dims)) for dims in ((5, 8, 12), (5, 12, 8), (9, 8, 8)))
    plan = trt.build(path, [wide, high, long])
    assert plan.nbytes > weight_bytes(student)
    two_clips = {name: (2, *shape[1:]) for name, shape in long.items()}
    with pytest.raises(EngineError, match=r"hidden_states is wanted from .* and in the graph it is"):
        trt.build(path, [long, two_clips])
    # The estimate is of the size that is asked for, not of the one that was exported.
    static = tiny.exported(student, tmp_path / "static.onnx", tiny.inputs(student, 9, 8, 8))
    assert trt.memory_bytes(path, long)[1] == pytest.approx(trt.memory_bytes(static, long)[1], rel=0.05)
    assert trt.memory_bytes(path, long)[1] > 1.5 * trt.memory_bytes(path, tiny.shapes(inputs))[1]


def test_weights_beside_the_graph_are_found(small, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_EXTERNAL_ABOVE_BYTES", 1000)
    path = tiny.exported(small, tmp_path / "graph.onnx")
    assert trt.build(path, sizes).nbytes > weight_bytes(small)
    (tmp_path / "graph.onnx.data").unlink()
    with pytest.raises(
        EngineError, match=r"graph\.onnx cannot be read by tensorrt_rtx .*: Failed to import initializer"
    ):
        trt.build(path, sizes)


def test_a_plan_that_does_not_fit_is_refused_with_what_to_do(graph, sizes):
    weights, activations = trt.memory_bytes(graph, sizes[0])
    with pytest.raises(EngineError, match=r"needs about .* of the GPU .*; use a smaller or shorter video, .* ENGINE"):
        trt.build(graph, sizes, limit_bytes=weights + activations - 1)
    assert trt.build(graph, sizes, limit_bytes=weights + activations).nbytes > weights


def test_the_estimate_is_of_the_weights_and_of_what_is_alive_at_a_time(small, graph, sizes):
    weights, activations = trt.memory_bytes(graph, sizes[0])
    buffers = sum(buffer.nbytes for buffer in small.buffers())
    assert weights == weight_bytes(small) + buffers
    num_tokens, widest = 12, 6 * 24  # the modulation of each token: six vectors
    assert num_tokens * widest * 4 < activations < 10 * num_tokens * widest * 4


@pytest.mark.parametrize(
    "content", [lambda graph: graph[: len(graph) // 2], lambda _: b"not a graph", lambda _: b""], ids=range(3)
)
def test_a_file_that_is_no_graph_gives_one_clear_error(graph, sizes, tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content(graph.read_bytes()))
    with pytest.raises(EngineError, match=r"^broken\.onnx cannot be read by tensorrt_rtx [\d.]+: \S.*$") as error:
        trt.build(path, sizes)
    assert "\n" not in str(error.value)


def test_another_size_than_the_graphs_is_refused(graph, small, sizes):
    other = tiny.shapes(tiny.inputs(small, frames=5))
    with pytest.raises(EngineError, match=r"hidden_states is wanted from .*5, 4, 4.* in the graph it is .*3, 4, 4"):
        trt.build(graph, [other])
    with pytest.raises(EngineError, match="export it with the axes dynamic"):
        trt.build(graph, [*sizes, other])
    with pytest.raises(EngineError, match=r"the graph's inputs are .*timestep; shapes are of hidden_states"):
        trt.build(graph, [{"hidden_states": sizes[0]["hidden_states"]}])


def test_a_weight_that_the_graph_has_not_cannot_be_made_replaceable(graph, sizes):
    with pytest.raises(EngineError, match=r"graph\.onnx has no weights blocks\.7\.attn1\.to_q\.bias"):
        trt.build(graph, sizes, refittable={"blocks.0.attn1.to_q.bias": 0, "blocks.7.attn1.to_q.bias": 0})


def test_the_profile_spans_the_sizes_and_prefers_the_largest():
    sizes = [
        {"x": (1, 4, 5, 8, 12), "t": (1, 120)},
        {"x": (1, 4, 5, 12, 8), "t": (1, 120)},
        {"x": (1, 4, 3, 8, 8), "t": (1, 48)},
    ]
    assert trt.profile(sizes) == {
        "x": ((1, 4, 3, 8, 8), (1, 4, 5, 8, 12), (1, 4, 5, 12, 12)),
        "t": ((1, 48), (1, 120), (1, 120)),
    }


def test_without_either_module_it_says_what_to_install(monkeypatch):
    monkeypatch.undo()  # the real `module`
    trt.module.cache_clear()
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=r"pip install 'fastlightgen\[gpu\]' .*'fastlightgen\[rtx\]'"):
        trt.module()
    monkeypatch.undo()
    assert trt.module().__name__ in ("tensorrt", "tensorrt_rtx")


# --- other weights ---------------------------------------------------------------------------------------------------


class Refitter:
    """`tensorrt.Refitter` as it is documented, of an engine that holds tensors."""

    def __init__(self, held, needed_together=(), works=True):
        self.held = dict(held)
        self.new = {}
        self.needed_together = needed_together
        self.works = works

    def get_all_weights(self):
        return list(self.held)

    def set_named_weights(self, name, weights):
        prototype = self.get_weights_prototype(name)
        if (prototype.dtype, prototype.size) != (weights.dtype, weights.size):
            return False
        self.new[name] = weights
        return True

    def get_weights_prototype(self, name):
        return trt._trt_weights(self.held[name])

    def get_missing_weights(self):
        return [name for name in self.needed_together if name not in self.new]

    def refit_cuda_engine(self):
        if self.works:
            self.held.update({name: torch.from_numpy(weights.numpy().copy()) for name, weights in self.new.items()})
        return self.works


@pytest.fixture
def weights():
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def test_weights_are_put_in_by_name(weights):
    refitter = Refitter({name: torch.zeros_like(weight) for name, weight in weights.items()})
    weights["a.weight"] = weights["a.weight"].T.contiguous().T  # whatever their order in memory is
    trt.refit(refitter, weights)
    assert all(torch.equal(refitter.held[name], weight.flatten()) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("held", "settings", "message"),
    [
        ({"a.weight": torch.zeros(2, 3)}, {}, "does not take weights for a.bias"),
        ({"a.weight": torch.zeros(2, 2)}, {}, "a.weight has 6 values of torch.float32; the plan takes 4 of"),
        ({"a.bias": torch.zeros(2)}, {}, "a.bias has 2 values of torch.float16; the plan takes 2 of DataType.FLOAT"),
        ({}, {"needed_together": ["b.bias"]}, "weights are missing for b.bias"),
        ({}, {"works": False}, "TensorRT could not put the weights in"),
    ],
)
def test_weights_that_cannot_be_put_in_are_named(weights, held, settings, message):
    if "does not" not in message:
        held = {**weights, **held}
    before = dict(held)
    refitter = Refitter(held, **settings)
    with pytest.raises(EngineError, match=message):
        trt.refit(refitter, weights)
    assert refitter.held == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("a.bias"), "weights are missing for a.bias"),
        (lambda weights: weights.update(b=torch.zeros(1)), "the plan has no weights b"),
        (lambda weights: weights.update({"a.bias": torch.zeros(3).half()}), r"a.bias is float16 \(3,\); .*16 \(2,\)"),
        (
            lambda weights: weights.update({"a.bias": torch.zeros(2)}),
            r"a.bias is float32 \(2,\); the plan takes float16",
        ),
    ],
)
def test_weights_of_another_graph_are_refused_before_a_plan_is_loaded(weights, change, message, tmp_path):
    built = trt.Built(True, "sha", trt._parameters(weights))
    (tmp_path / "built.json").write_text(json.dumps(trt.asdict(built)))
    built = trt.Built.read(tmp_path)
    built.check(weights)
    change(weights)
    with pytest.raises(EngineError, match=message):
        built.check(weights)


def test_an_engine_keeps_its_weights_until_others_have_passed(weights, monkeypatch):
    engine = object.__new__(trt.TrtEngine)
    engine._engine, engine._context = "old engine", "old context"
    engine._stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(trt.TrtEngine, "_load", lambda _self, given: ("engine", given))
    seen = []

    def refuses(second):
        seen.append((second._engine, second._context, engine._context))
        raise EngineError("differs from PyTorch")

    with pytest.raises(EngineError, match="differs"):
        engine.refit(weights, refuses)
    assert seen == [("engine", weights, "old context")]
    assert (engine._engine, engine._context) == ("old engine", "old context")
    engine.refit(weights, lambda _second: None)
    assert (engine._engine, engine._context) == ("engine", weights)


# --- all of it -------------------------------------------------------------------------------------------------------


class GraphEngine(Engine):
    """In place of `TrtEngine`: its plan is the graph itself, run by onnxruntime."""

    name = "graph"
    loses = ""
    """A weight that cannot be replaced in a refittable plan."""

    def __init__(self, folder, config, dtype, device, weights=None):
        super().__init__(config, dtype, device)
        built = trt.Built.read(folder)
        if built.refittable and self.loses:
            raise EngineError(f"the plan does not take weights for {self.loses}")
        self.refitted = weights is not None
        path = folder / "model.plan"
        if self.refitted:
            built.check(weights)
            path = folder.parent / "refitted.onnx"
            export.with_weights(folder / "model.plan", weights, path)
        self._run = Session(path, threads=1)

    def infer(self, inputs):
        return self._run(**inputs)


@contextmanager
def building():
    """What is built, in place of plans, on a GPU that is not there."""
    plans = []

    def build(path, _sizes, *, refittable, timing_cache):
        assert timing_cache.name.startswith("timings-")
        plans.append("replaceable" if refittable else "fixed")
        return memoryview(path.read_bytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trt, "module", lambda: tensorrt_rtx)
        patch.setattr(trt, "build", build)
        patch.setattr(trt, "TrtEngine", GraphEngine)
        patch.setattr(trt, "_gpu", lambda: {"name": "none"})
        patch.setattr(export, "export", quick_export)
        yield plans


@pytest.fixture
def built():
    with building() as plans:
        yield plans


_export, _exported = export.export, {}


def quick_export(module, inputs, path, _axes):
    """Each structure once, static; then its graph with this module's weights."""
    structure = (module.config.num_layers, *(tuple(value.shape) for value in inputs.values()))
    if structure not in _exported:
        _export(module, inputs, path, {})
        _exported[structure] = path.read_bytes()
    else:
        path.write_bytes(_exported[structure])
        export.with_weights(path, module.state_dict(), path)


@pytest.fixture(scope="module")
def kept(small, tmp_path_factory):
    """What one start of the worker leaves."""
    folder = tmp_path_factory.mktemp("engines")
    with torch.no_grad(), building() as plans:
        assert not trt.make(tiny.model(small), Cache(folder)).refitted
    assert plans == ["replaceable"]
    return folder


@pytest.fixture
def builds(kept, tmp_path):
    return Cache(shutil.copytree(kept, tmp_path / "engines"))


@pytest.fixture
def no_export(monkeypatch):
    def refuse(*_):
        raise AssertionError("exported")

    monkeypatch.setattr(export, "export", refuse)


@pytest.mark.usefixtures("no_export")
def test_a_second_start_builds_nothing(small, builds, built):
    assert not trt.make(tiny.model(small), builds).refitted
    assert built == []
    assert not list(builds.folder.glob("export-*"))  # graphs are as large as plans


@pytest.mark.usefixtures("no_export")
def test_another_students_weights_go_into_the_plan_that_is_there(small, builds, built):
    other = tiny.perturbed(small)
    engine = trt.make(tiny.model(other, "two"), builds)
    assert engine.refitted
    assert built == []
    inputs = tiny.inputs(small)
    assert torch.allclose(engine.infer(inputs), other(**inputs, return_dict=False)[0], atol=1e-5)


def test_another_graph_needs_another_plan(builds, built):
    trt.make(tiny.model(tiny.transformer(num_layers=2)), builds)
    assert built == ["replaceable"]


def test_another_gpu_version_or_size_needs_another_plan(small, builds, built, monkeypatch):
    monkeypatch.setattr(trt, "_gpu", lambda: {"name": "another"})
    trt.make(tiny.model(small), builds)
    monkeypatch.setattr(trt, "module", lambda: SimpleNamespace(__name__="tensorrt_rtx", __version__="9.9"))
    trt.make(tiny.model(small), builds)
    trt.make(tiny.model(small), builds, [tiny.shapes(tiny.inputs(small, columns=2))])
    assert built == ["replaceable"] * 3


def test_where_weights_cannot_be_replaced_the_plan_is_of_one_student(small, builds, built, monkeypatch, caplog):
    """As TensorRT 11.3 may lose a bias in a refittable plan."""
    monkeypatch.setattr(GraphEngine, "loses", "blocks.0.attn1.to_q.bias")
    assert not trt.make(tiny.model(small), builds).refitted
    assert (
        "no plan that takes other weights: the plan does not take weights for blocks.0.attn1.to_q.bias" in caplog.text
    )
    assert built == ["fixed"]
    caplog.clear()
    trt.make(tiny.model(small), builds)
    assert (built, caplog.text) == (["fixed"], "")  # what failed is not tried again
    trt.make(tiny.model(tiny.perturbed(small), "two"), builds)
    assert built == ["fixed", "fixed"]


@pytest.mark.usefixtures("built")
def test_a_plan_that_computes_something_else_is_not_served(small, builds, monkeypatch):
    moved = []
    monkeypatch.setattr(small, "to", lambda device: moved.append(str(device)))
    monkeypatch.setattr(GraphEngine, "infer", lambda self, inputs: 1.01 * self._run(**inputs))
    with pytest.raises(
        EngineError, match=r"graph differs from PyTorch by 0\.01 of the largest value; 0\.005 is allowed"
    ):
        trt.make(tiny.model(small), builds)
    assert moved == ["cpu", str(small.device)]  # and PyTorch can go on


def test_a_plan_that_was_changed_is_built_anew(small, builds, built):
    path = next(builds.folder.glob("*/model.plan"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    trt.make(tiny.model(small), builds)
    assert built == ["replaceable"]


def test_axes_that_a_backbone_does_not_allow_are_refused(small, builds, built):
    other = {**tiny.shapes(tiny.inputs(small)), "encoder_hidden_states": (1, 16, 8)}
    with pytest.raises(EngineError, match=r"encoder_hidden_states is wanted from .*its axes 1 cannot differ"):
        trt.make(tiny.model(small), builds, [other])
    assert built == []
