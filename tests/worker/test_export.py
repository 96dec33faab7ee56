"""What is exported computes what PyTorch computes, and holds every parameter under its own name."""

import copy

import onnx
import pytest
import torch
from onnx.numpy_helper import to_array

from distill.backbones import wan
from tests.worker import tiny
from worker.engine import choice, export
from worker.engine.eager import EagerEngine
from worker.engine.errors import EngineError
from worker.engine.ort import OrtEngine

DIMS = {"frames": 5, "rows": 8, "columns": 8}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def student():
    return tiny.student()


@pytest.fixture(scope="module")
def graph(student, tmp_path_factory):
    """The bundled student's, for its own size of video."""
    return tiny.exported(student, tmp_path_factory.mktemp("student") / "graph.onnx", tiny.inputs(student, **DIMS))


@pytest.fixture(scope="module")
def small():
    return tiny.transformer()


@pytest.fixture(scope="module")
def small_graph(small, tmp_path_factory):
    return tiny.exported(small, tmp_path_factory.mktemp("small") / "graph.onnx")


def check_parity(path, model, inputs, tolerance=1e-4):
    choice.check_parity(OrtEngine(path, model.config, threads=1), EagerEngine(model), inputs, tolerance)


# --- what it computes ------------------------------------------------------------------------------------------------


def test_onnxruntime_gives_pytorchs_output(student, graph):
    check_parity(graph, student, tiny.inputs(student, **DIMS))


def test_with_other_weights_it_is_the_other_student(student, graph, tmp_path):
    other, inputs = tiny.perturbed(student), tiny.inputs(student, **DIMS)
    export.with_weights(graph, other.state_dict(), tmp_path / "other.onnx")
    check_parity(tmp_path / "other.onnx", other, inputs)
    with pytest.raises(EngineError, match="differs from PyTorch"):
        check_parity(graph, other, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("frames", "rows", "columns"), [(5, 8, 8), (3, 8, 8), (5, 12, 8), (2, 6, 16)])
def test_the_dynamic_axes_take_other_sizes(student, dynamic_graph, frames, rows, columns):
    check_parity(dynamic_graph, student, tiny.inputs(student, frames, rows, columns))


@pytest.mark.slow
def test_the_dynamic_axes_take_several_clips(student, dynamic_graph):
    inputs = tiny.inputs(student, **DIMS)
    check_parity(dynamic_graph, student, {name: torch.cat([value, value.flip(1)]) for name, value in inputs.items()})


@pytest.fixture(scope="module")
def dynamic_graph(student, tmp_path_factory):
    path = tmp_path_factory.mktemp("dynamic") / "graph.onnx"
    return tiny.exported(student, path, tiny.inputs(student, **DIMS), wan.EXPORT_AXES)


# --- the graph -------------------------------------------------------------------------------------------------------


def test_no_operator_is_one_that_tensorrt_cannot_read_or_fuse(student, graph):
    operators = [node.op_type for node in onnx.load(graph).graph.node]
    assert not {"ScatterND", "SplitToSequence", "SequenceAt", "SequenceConstruct"} & {*operators}
    assert operators.count("Attention") == 2 * student.config.num_layers
    assert "RMSNormalization" in operators


def test_every_parameter_is_an_initializer_of_its_own_name_shape_and_values(student, graph):
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(graph).graph.initializer}
    for name, weight in student.state_dict().items():
        assert found[name].shape == tuple(weight.shape)
        assert (found[name] == weight.numpy()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_graph_in_half_precision_has_the_parameters_types(dtype, tmp_path):
    model = tiny.transformer(dtype=dtype)
    model.condition_embedder.time_embedder.float()  # as diffusers loads it
    model.scale_shift_table.data = model.scale_shift_table.data.float()
    path = tiny.exported(model, tmp_path / "graph.onnx")
    export.check_names(path, model.state_dict())
    types = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    half = {torch.float16: onnx.TensorProto.FLOAT16, torch.bfloat16: onnx.TensorProto.BFLOAT16}[dtype]
    assert types["blocks.0.attn1.to_q.weight"] == half
    assert types["scale_shift_table"] == onnx.TensorProto.FLOAT
    assert onnx.load(path).graph.output[0].type.tensor_type.elem_type == half


def test_it_says_nothing_of_this_machine(graph):
    assert b"site-packages" not in graph.read_bytes()


def test_a_module_that_cannot_be_exported_says_why(tmp_path):
    class Stubborn(torch.nn.Module):
        def forward(self, x, return_dict):
            raise NotImplementedError("it has no export yet")

    with pytest.raises(EngineError, match="Stubborn cannot be exported: NotImplementedError: it has no export yet"):
        export.export(Stubborn(), {"x": torch.ones(1)}, tmp_path / "graph.onnx", {})


def test_weights_above_the_limit_of_one_file_stand_beside_it(small, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_EXTERNAL_ABOVE_BYTES", 1000)
    path, other = tiny.exported(small, tmp_path / "graph.onnx"), tiny.perturbed(small)
    export.with_weights(path, other.state_dict(), tmp_path / "other.onnx")
    weight_bytes = sum(parameter.nbytes for parameter in small.parameters())
    for name in ("graph.onnx", "other.onnx"):
        # Both put the smallest tensors into the graph itself.
        assert (tmp_path / f"{name}.data").stat().st_size > 0.5 * weight_bytes
    name = "blocks.0.ffn.net.0.proj.weight"
    [stored] = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name == name]
    assert (to_array(stored) == small.state_dict()[name].numpy()).all()
    check_parity(path, small, tiny.inputs(small))
    check_parity(tmp_path / "other.onnx", other, tiny.inputs(small))


# --- the structure ---------------------------------------------------------------------------------------------------


def test_two_students_have_one_structure(small, small_graph, tmp_path):
    other = tiny.perturbed(small)
    path = tiny.exported(other, tmp_path / "graph.onnx")
    assert path.read_bytes() != small_graph.read_bytes()
    weights = small.state_dict()
    assert export.structure_sha256(path, weights) == export.structure_sha256(small_graph, weights)
    assert export.structure_sha256(path, {}) != export.structure_sha256(small_graph, {})


def test_another_number_of_blocks_or_size_is_another_structure(small, small_graph, tmp_path):
    deeper = tiny.transformer(num_layers=2)
    made = {export.structure_sha256(small_graph, small.state_dict())}
    made.add(export.structure_sha256(tiny.exported(deeper, tmp_path / "deeper.onnx"), deeper.state_dict()))
    wider = tiny.exported(small, tmp_path / "wider.onnx", tiny.inputs(small, columns=8))
    made.add(export.structure_sha256(wider, small.state_dict()))
    assert len(made) == 3


NAME = "blocks.0.ffn.net.2.bias"


def missing(weights):
    del weights[NAME]


def unknown(weights):
    weights["blocks.9.ffn.net.2.bias"] = weights[NAME]


def of_another_shape(weights):
    weights[NAME] = weights[NAME][:-1]


def of_another_type(weights):
    weights[NAME] = weights[NAME].half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"no weights are given for 1 parameters, as blocks\.0\.ffn\.net\.2\.bias"),
        (unknown, r"parameter blocks\.9\.ffn\.net\.2\.bias should be .* the graph has none of that name"),
        (of_another_shape, r"parameter blocks\.0\.ffn\.net\.2\.bias should be .*\(23,\), 1.* the graph has .*\(24,\)"),
        (of_another_type, r"parameter blocks\.0\.ffn\.net\.2\.bias should be .*\(24,\), 10"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(small, small_graph, tmp_path, change, message):
    weights = small.state_dict()
    change(weights)
    with pytest.raises(EngineError, match=message):
        export.with_weights(small_graph, weights, tmp_path / "other.onnx")
    assert not (tmp_path / "other.onnx").exists()


# --- the backbone's side ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_exported_is_the_stock_attention_to_the_bit(dtype):
    model = tiny.student(dtype)
    inputs = tiny.inputs(model, **DIMS)
    stock = EagerEngine(model).infer(inputs)
    with wan.exporting(model):
        assert torch.equal(EagerEngine(model).infer(inputs), stock)


def test_the_stock_processors_come_back(small):
    before = copy.copy(small.attn_processors)
    with pytest.raises(KeyboardInterrupt), wan.exporting(small):
        assert all(small.attn_processors[name] is not processor for name, processor in before.items())
        raise KeyboardInterrupt
    assert all(small.attn_processors[name] is processor for name, processor in before.items())
