"""An ONNX model of any kind with named tensors: what it computes, and what is said of what it can not take."""

import numpy as np
import onnx_ir as ir
import pytest

from penstock.backends.contract import InvalidTensor, TensorSpec
from penstock.backends.onnxruntime.providers import choose
from penstock.backends.onnxruntime.tensors import open_tensor_model
from penstock.common.service import StartError

TABLE = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)


def value(name, dtype, *shape):
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def write(path, ids_type=ir.DataType.INT64):
    """Mean of embeddings under a mask, as sentence encoders end: ids [batch, tokens], mask [batch, tokens] → [batch, 4]."""
    tape = ir.tape.Tape()
    ids, mask = value("ids", ids_type, "batch", "tokens"), value("mask", ir.DataType.FLOAT, "batch", "tokens")
    table = ir.Value(
        name="table", const_value=ir.tensor(TABLE, name="table"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((10, 4))
    )
    axis = ir.Value(
        name="axis", const_value=ir.tensor(np.array([1]), name="axis"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1,))
    )
    last = ir.Value(
        name="last", const_value=ir.tensor(np.array([2]), name="last"), type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1,))
    )
    weighted = tape.op("Mul", [tape.op("Gather", [table, ids]), tape.op("Unsqueeze", [mask, last])])
    mean = tape.op(
        "Div", [tape.op("ReduceSum", [weighted, axis], {"keepdims": 0}), tape.op("ReduceSum", [mask, axis], {"keepdims": 1})]
    )
    mean.name, mean.type, mean.shape = "mean", ir.TensorType(ir.DataType.FLOAT), ir.Shape(("batch", 4))
    graph = ir.Graph(
        [ids, mask], [mean], nodes=tape.nodes, initializers=[table, axis, last], opset_imports={"": 21}, name="encoder"
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


@pytest.fixture
def model(tmp_path):
    opened = open_tensor_model(write(tmp_path / "encoder.onnx"), device="cpu", threads=1)
    yield opened
    opened.close()


def test_it_computes_what_numpy_does(model):
    assert model.inputs == {"ids": TensorSpec("int64", ("batch", "tokens")), "mask": TensorSpec("float32", ("batch", "tokens"))}
    assert model.outputs == {"mean": TensorSpec("float32", ("batch", 4))}
    assert model.device == "cpu"
    ids = np.array([[1, 2, 3], [4, 5, 0]])
    mask = np.array([[1, 1, 1], [1, 1, 0]], np.float32)
    right = (TABLE[ids] * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(model.infer({"ids": ids, "mask": mask})["mean"], right, rtol=1e-6)


IDS, MASK = np.zeros((2, 3), np.int64), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ids": IDS}, "mask: missing; the model takes ids, mask"),
        ({"ids": IDS, "mask": MASK, "type": IDS}, "type: the model has no such input"),
        ({"ids": IDS.astype(np.int32), "mask": MASK}, "ids: must be int64, not int32"),
        ({"ids": IDS[0], "mask": MASK}, r"ids: must have shape \[batch, tokens\], not \[3\]"),
        ({"ids": IDS, "mask": MASK[:, :2]}, "mask: tokens is 2 here and 3 in ids"),
    ],
)
def test_a_wrong_input_is_named_with_what_is_right(model, inputs, message):
    with pytest.raises(InvalidTensor, match=message):
        model.infer(inputs)


def test_an_id_that_the_table_has_not_fails_that_call_alone(model):
    with pytest.raises(RuntimeError, match="onnxruntime failed"):
        model.infer({"ids": IDS + 10, "mask": MASK})
    np.testing.assert_allclose(model.infer({"ids": IDS, "mask": MASK})["mean"], TABLE[[0, 0]], rtol=1e-6)


def test_closing_twice_is_harmless_and_then_it_says_so(model):
    model.close()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.infer({"ids": IDS, "mask": MASK})


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path):
    with pytest.raises(StartError, match=r"absent\.onnx: no such file"):
        open_tensor_model(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(StartError, match=r"text\.onnx: onnxruntime can not load it"):
        open_tensor_model(tmp_path / "text.onnx")


def test_strings_are_refused(tmp_path):
    strings = value("text", ir.DataType.STRING, 1)
    tape = ir.tape.Tape()
    out = tape.op("Identity", [strings])
    out.name, out.type, out.shape = "out", ir.TensorType(ir.DataType.STRING), ir.Shape((1,))
    ir.save(ir.Model(ir.Graph([strings], [out], nodes=tape.nodes, opset_imports={"": 21}), ir_version=10), tmp_path / "s.onnx")
    with pytest.raises(StartError, match=r"text is a tensor\(string\)"):
        open_tensor_model(tmp_path / "s.onnx", device="cpu")


def test_the_best_device_is_taken_and_the_cpu_behind_it():
    available = ["CPUExecutionProvider", "MIGraphXExecutionProvider", "AzureExecutionProvider"]
    assert choose(None, available) == ("migraphx", ["MIGraphXExecutionProvider", "CPUExecutionProvider"])
    assert choose("cpu", available) == ("cpu", ["CPUExecutionProvider"])
    assert choose("cuda:1", ["CUDAExecutionProvider", "CPUExecutionProvider"])[0] == "cuda:1"
    with pytest.raises(StartError, match="cuda is not here; onnxruntime has migraphx, cpu"):
        choose("cuda", available)
