"""The decoder as an ONNX graph of standard operators alone, which TensorRT's parser reads: no contrib operators, no plug-ins.

One run computes B sequences with L new tokens each, behind up to P that stand in a cache whose rows are the caller's. Keys and
values of the past are gathered from the cache by row; those of the new tokens are outputs, for the caller to put where they
belong. So the cache may be paged in any way, and the graph knows nothing of blocks.

Products take two-dimensional operands (`Gemm`, with the weights as the checkpoint has them), because that is what the parser
turns into one matrix multiplication. Norms, rotation, softmax and logits are computed in float32 whatever the type of the
weights: TensorRT keeps to the graph's types (its networks are strongly typed).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DType

__all__ = ["INPUTS", "LOGITS", "UNSEEN", "DecoderGraph", "build_graph", "cache_name", "new_name"]

# The version of the operators: within what every parser since TensorRT 8.6 reads.
OPSET = 17
IR_VERSION = 8

INPUTS = ("token_ids", "positions", "past_slots", "past_positions", "logits_rows")
"""The int32 inputs, besides the cache."""

LOGITS = "logits"

UNSEEN = np.iinfo(np.int32).max
"""What stands in `past_positions` for a row that pads: a token sees none behind itself."""

_TYPES = {DType.F32: TensorProto.FLOAT, DType.BF16: TensorProto.BFLOAT16}
_INPUT_SHAPES = ("B", "L"), ("B", "L"), ("B", "P"), ("B", "P"), ("R",)
# A score that comes to no share of attention; infinity would make NaN of a row in which nothing is seen.
_UNLIKELY = float(np.finfo(np.float32).min)


def cache_name(kind: str, layer: int) -> str:
    """The input [slots, kv heads, head dim] that is a layer's cache of keys or values."""
    return f"cache_{kind}.{layer}"


def new_name(kind: str, layer: int) -> str:
    """The output [B, L, kv heads, head dim]: a layer's keys or values of the new tokens."""
    return f"new_{kind}.{layer}"


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """A graph without its weights.

    Attributes:
        model: its weights are initializers that are declared and hold no data.
        weights: the names of these, which are the checkpoint's.
    """

    model: onnx.ModelProto
    weights: tuple[str, ...]


def build_graph(spec: DecoderSpec, dtype: DType) -> DecoderGraph:
    """The graph of a decoder.

    Inputs, all int32: `token_ids` and `positions` [B, L]; `past_slots` [B, P], rows of the cache that each sequence reads, and
    `past_positions` [B, P], the positions of what stands there; `logits_rows` [R], among the B · L tokens. Besides them the cache,
    `cache_name` for each layer. B, L, P and R are at least 1.

    Outputs: `logits` float32 [R, vocabulary], and `new_name` for each layer.
    """
    return _Builder(spec, dtype).build()


class _Builder:
    def __init__(self, spec: DecoderSpec, dtype: DType) -> None:
        self.spec, self.type = spec, _TYPES[dtype]
        self.shapes = spec.weight_shapes()
        self.shared = spec.heads // spec.kv_heads
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.weights: list[str] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def build(self) -> DecoderGraph:
        spec, names = self.spec, self.spec.weights
        for name, shape in zip(INPUTS, _INPUT_SHAPES, strict=True):
            self.input(name, TensorProto.INT32, *shape)
        self.batch = self.op("Shape", "token_ids")  # [B, L]
        self.cosine, self.sine = self.angles()
        self.seen = self.mask()
        tokens = self.op("Reshape", "token_ids", self.ints(-1))
        hidden = self.op("Gather", self.weight(names.embedding), tokens)
        for layer in range(spec.layers):
            attended = self.attention(hidden, layer)
            if layer == spec.layers - 1:  # what follows no other token sees
                attended, hidden = (self.op("Gather", x, "logits_rows") for x in (attended, hidden))
            hidden = self.op("Add", hidden, self.product(attended, "o", layer))
            hidden = self.op("Add", hidden, self.feed_forward(hidden, layer))
        logits = self.gemm(self.norm(hidden, names.final_norm), names.lm_head or names.embedding)
        self.output(LOGITS, self.to_float(logits), TensorProto.FLOAT, "R", spec.vocabulary_size)
        graph = helper.make_graph(self.nodes, spec.architecture, self.inputs, self.outputs, list(self.initializers.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penstock")
        return DecoderGraph(model, tuple(self.weights))

    def attention(self, hidden: str, layer: int) -> str:
        """Attention of each token over its sequence, [B · L, heads · head dim].

        Queries that share a KV head stand as rows of that head, so that no key is repeated.
        """
        spec = self.spec
        normed = self.norm(hidden, self.name("input_norm", layer))
        query = self.rotated(self.heads(normed, "q", self.shared, layer), "q_norm", layer, scale=spec.head_dim**-0.5)
        query = self.op("Transpose", query, perm=[0, 2, 3, 1, 4])
        query = self.op("Reshape", query, self.ints(0, 0, -1, spec.head_dim))
        key = self.rotated(self.heads(normed, "k", 1, layer), "k_norm", layer)
        keys = self.with_past("key", key, layer)
        values = self.with_past("value", self.heads(normed, "v", 1, layer), layer)
        scores = self.to_float(self.op("MatMul", query, self.op("Transpose", keys, perm=[0, 2, 3, 1])))
        likely = self.op("Softmax", self.op("Where", self.seen, scores, self.float(_UNLIKELY)), axis=-1)
        attended = self.op("MatMul", self.to_type(likely), self.op("Transpose", values, perm=[0, 2, 1, 3]))
        attended = self.op("Reshape", attended, self.ints(0, 0, self.shared, -1, spec.head_dim))
        attended = self.op("Transpose", attended, perm=[0, 3, 1, 2, 4])
        return self.op("Reshape", attended, self.ints(-1, spec.heads * spec.head_dim))

    def mask(self) -> str:
        """Bool [B, 1, shared · L, K]: which of the past and the new tokens a query sees, once for each that shares a KV head."""
        keys = self.op("Concat", "past_positions", "positions", axis=1)
        keys = self.op("Unsqueeze", keys, self.ints(1, 2))
        queries = self.op("Unsqueeze", "positions", self.ints(1, 3))
        seen = self.op("LessOrEqual", keys, queries)
        if self.spec.sliding_window is not None:
            oldest = self.op("Sub", queries, self.constant(np.array(self.spec.sliding_window, np.int32)))
            seen = self.op("And", seen, self.op("Greater", keys, oldest))
        return seen if self.shared == 1 else self.op("Concat", *[seen] * self.shared, axis=2)

    def with_past(self, kind: str, new: str, layer: int) -> str:
        """[B, P + L, kv heads, head dim]: what the cache holds of each sequence, and behind it the new."""
        heads, dim = self.spec.kv_heads, self.spec.head_dim
        self.output(new_name(kind, layer), self.op("Reshape", new, self.ints(0, 0, heads, dim)), self.type, "B", "L", heads, dim)
        cache = self.input(cache_name(kind, layer), self.type, "slots", heads, dim)
        return self.op("Concat", self.op("Gather", cache, "past_slots"), new_name(kind, layer), axis=1)

    def angles(self) -> tuple[str, str]:
        """Cosine and sine float32 [B, L, 1, 1, head dim / 2]."""
        positions = self.op("Unsqueeze", self.op("Cast", "positions", to=TensorProto.FLOAT), self.ints(2, 3, 4))
        angle = self.op("Mul", positions, self.constant(self.spec.rope.inverse_frequencies()))
        cosine, sine = self.op("Cos", angle), self.op("Sin", angle)
        if self.spec.rope.magnitude == 1:
            return cosine, sine
        magnitude = self.constant(np.array(self.spec.rope.magnitude, np.float32))
        return self.op("Mul", cosine, magnitude), self.op("Mul", sine, magnitude)

    def heads(self, x: str, role: str, shared: int, layer: int) -> str:
        """A product as [B, L, kv heads, shared, head dim]."""
        shape = self.op("Concat", self.batch, self.ints(self.spec.kv_heads, shared, self.spec.head_dim), axis=0)
        return self.op("Reshape", self.product(x, role, layer), shape)

    def rotated(self, x: str, norm: str, layer: int, scale: float = 1.0) -> str:
        """Heads, normalised where the family does so, turned to their positions, and scaled."""
        name: str | None = getattr(self.spec.weights.layer, norm)
        x = self.to_float(x if name is None else self.norm(x, name.format(layer=layer)))
        half = self.spec.head_dim // 2
        low, high = self.ops("Split", 2, x, self.ints(half, half), axis=-1)
        first = self.op("Sub", self.op("Mul", low, self.cosine), self.op("Mul", high, self.sine))
        second = self.op("Add", self.op("Mul", high, self.cosine), self.op("Mul", low, self.sine))
        x = self.op("Concat", first, second, axis=-1)
        return self.to_type(x if scale == 1.0 else self.op("Mul", x, self.float(scale)))

    def norm(self, x: str, name: str) -> str:
        """Root-mean-square normalisation over the last axis."""
        x = self.to_float(x)
        mean = self.op("ReduceMean", self.op("Mul", x, x), axes=[-1], keepdims=1)
        size = self.op("Sqrt", self.op("Add", mean, self.float(self.spec.norm_epsilon)))
        return self.op("Mul", self.to_type(self.op("Div", x, size)), self.weight(name))

    def feed_forward(self, hidden: str, layer: int) -> str:
        normed = self.norm(hidden, self.name("post_attention_norm", layer))
        gate = self.product(normed, "gate", layer)
        gate = self.op("Mul", gate, self.op("Sigmoid", gate))
        return self.product(self.op("Mul", gate, self.product(normed, "up", layer)), "down", layer)

    def product(self, x: str, role: str, layer: int) -> str:
        bias: str | None = getattr(self.spec.weights.layer, f"{role}_bias", None)
        return self.gemm(x, self.name(role, layer), *([] if bias is None else [bias.format(layer=layer)]))

    def gemm(self, x: str, *names: str) -> str:
        return self.op("Gemm", x, *(self.weight(name) for name in names), transB=1)

    def name(self, role: str, layer: int) -> str:
        name: str = getattr(self.spec.weights.layer, role)
        return name.format(layer=layer)

    def to_float(self, x: str) -> str:
        return x if self.type == TensorProto.FLOAT else self.op("Cast", x, to=TensorProto.FLOAT)

    def to_type(self, x: str) -> str:
        return x if self.type == TensorProto.FLOAT else self.op("Cast", x, to=self.type)

    def input(self, name: str, dtype: int, *shape: str | int) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, x: str, dtype: int, *shape: str | int) -> None:
        self.nodes.append(helper.make_node("Identity", [x], [name], name))
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def weight(self, name: str) -> str:
        """A tensor of the checkpoint: its type and shape alone."""
        if name not in self.initializers:
            declared = TensorProto(name=name, data_type=self.type, dims=self.shapes[name], data_location=TensorProto.EXTERNAL)
            declared.external_data.add(key="location", value="checkpoint")
            self.initializers[name] = declared
            self.weights.append(name)
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def float(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def constant(self, array: NDArray[Any]) -> str:
        name = f"constant.{array.dtype}{list(array.shape)}:{array.tobytes().hex()}"
        name = name if len(name) < 80 else f"constant.{len(self.initializers)}"
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        (output,) = self.ops(kind, 1, *inputs, **attributes)
        return output

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        name = f"{kind}.{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **attributes))
        return names
