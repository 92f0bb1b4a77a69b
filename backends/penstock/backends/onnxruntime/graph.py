"""The decoder of a `DecoderSpec` as an ONNX graph, written node by node; no exporter, and nothing of a runtime is imported.

Products with int8 and int4 weights, grouped-query attention over a cache, rotary positions and RMS norms are ONNX Runtime's
contributed operators (domain ``com.microsoft``), each of which is one kernel there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.onnxruntime.weights import BITS, WeightSource

__all__ = ["EXTERNAL", "build"]

EXTERNAL = "weights"
"""The file that initialisers are said to stand in."""

_CONTRIB = "com.microsoft"
_OPSETS = {"": 21, _CONTRIB: 1}
_IR_VERSION = 10
# MatMulNBits may round its other operand to int8, block by block: it then multiplies whole numbers.
_INT8_INPUTS = 4


def build(spec: DecoderSpec, weights: WeightSource, context: int) -> ir.Model:
    """The graph of a step of `batch` sequences with equally many new `tokens` each.

    Inputs: ``token_ids`` int64 [batch, tokens]; ``last_positions`` int32 [batch], of each sequence's last new token; ``longest``
    int32 [1], tokens of the longest sequence, past and new; ``logits_rows`` int64 [rows], indices into batch · tokens; and for each
    layer ``key.LAYER`` and ``value.LAYER``, [batch, kv heads, capacity, head dim] of the type that is computed with: the cache.
    Outputs: ``logits`` float32 [rows, vocabulary], and ``key.LAYER.out`` and ``value.LAYER.out``, which are to be bound to the
    memory of the cache's inputs: they are then written in place. Several new tokens with past ones before them need a batch of 1,
    by the attention operator.

    Args:
        spec: the decoder.
        weights: gives initialisers, and the type that is computed with; the graph names those in ``weights.arrays`` and holds none
            of them.
        context: tokens that a sequence can hold.
    """
    return _Builder(spec, weights, context).build()


class _Builder:
    def __init__(self, spec: DecoderSpec, weights: WeightSource, context: int) -> None:
        self.spec, self.weights = spec, weights
        self.context = context
        self.float = ir.DataType.from_numpy(weights.compute)
        self.tape = ir.tape.Tape()
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.initializers: dict[str, ir.Value] = {}

    def build(self) -> ir.Model:
        spec, names = self.spec, self.spec.weights
        tokens = self.input("token_ids", ir.DataType.INT64, "batch", "tokens")
        self.last = self.input("last_positions", ir.DataType.INT32, "batch")
        self.longest = self.input("longest", ir.DataType.INT32, 1)
        rows = self.input("logits_rows", ir.DataType.INT64, "rows")
        hidden = self.op("Gather", self.held(self.weights.table(names.embedding)), tokens)
        hidden = self.op("Cast", hidden, to=self.float)
        normed = self.norm(hidden, self.name("input_norm", 0))
        for layer in range(spec.layers):
            attended = self.attention(normed, layer)
            if layer == spec.layers - 1:  # what follows no other token sees
                attended, hidden = (self.rows(x, rows, width) for x, width in self.widths(attended, hidden))
            projected = self.biased(self.product(attended, ("o",), layer), ("o",), layer)
            normed, hidden = self.skip_norm(projected, hidden, self.name("post_attention_norm", layer))
            forward = self.feed_forward(normed, layer)
            following = self.name("input_norm", layer + 1) if layer < spec.layers - 1 else names.final_norm
            normed, hidden = self.skip_norm(forward, hidden, following)
        logits = self.weight_product(normed, names.lm_head or names.embedding)
        if self.float != ir.DataType.FLOAT:
            logits = self.op("Cast", logits, to=ir.DataType.FLOAT)
        self.output(logits, ir.DataType.FLOAT, "logits", "rows", spec.vocabulary_size)
        return self.model()

    def model(self) -> ir.Model:
        logits, cache = self.outputs[-1], self.outputs[:-1]
        graph = ir.Graph(
            self.inputs,
            [logits, *cache],
            nodes=self.tape.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=_OPSETS,
            name=self.spec.architecture,
        )
        return ir.Model(graph, ir_version=_IR_VERSION, producer_name="penstock")

    def input(self, name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ir.DataType, name: str, *shape: int | str) -> None:
        value.name, value.shape, value.type = name, ir.Shape(shape), ir.TensorType(dtype)
        self.outputs.append(value)

    def held(self, name: str) -> ir.Value:
        """An initialiser whose data stand outside the model."""
        if name not in self.initializers:
            array = self.weights.arrays[name]
            tensor = ir.ExternalTensor(
                EXTERNAL, 0, array.nbytes, ir.DataType.from_numpy(array.dtype), shape=_shape(array), name=name
            )
            self.initializers[name] = ir.Value(name=name, shape=_shape(array), type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self.initializers[name]

    def constant(self, name: str, values: Sequence[int]) -> ir.Value:
        if name not in self.initializers:
            array = np.array(values, np.int64)
            tensor = ir.tensor(array, name=name)
            self.initializers[name] = ir.Value(name=name, shape=_shape(array), type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self.initializers[name]

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: float) -> ir.Value:
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def split(self, x: ir.Value, widths: Sequence[int]) -> Sequence[ir.Value]:
        sizes = self.constant("split_" + "_".join(map(str, widths)), widths)
        return self.tape.op_multi_out("Split", [x, sizes], {"axis": -1}, num_outputs=len(widths))

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        return self.op("Reshape", x, self.constant("shape_" + "_".join(map(str, shape)), shape))

    def name(self, role: str, layer: int) -> str:
        name: str = getattr(self.spec.weights.layer, role)
        return name.format(layer=layer)

    def has(self, role: str) -> bool:
        return getattr(self.spec.weights.layer, role, None) is not None

    def widths(self, attended: ir.Value, hidden: ir.Value) -> list[tuple[ir.Value, int]]:
        return [(attended, self.spec.heads * self.spec.head_dim), (hidden, self.spec.hidden_size)]

    def rows(self, x: ir.Value, rows: ir.Value, width: int) -> ir.Value:
        """Rows of [batch, tokens, width], counted over both: [rows, width]."""
        return self.op("Gather", self.reshape(x, -1, width), rows)

    def norm(self, x: ir.Value, weight: str) -> ir.Value:
        scale = self.held(self.weights.vector(weight))
        return self.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=self.spec.norm_epsilon)

    def skip_norm(self, x: ir.Value, skip: ir.Value, weight: str) -> tuple[ir.Value, ir.Value]:
        """The norm of a sum, and the sum."""
        inputs = [x, skip, self.held(self.weights.vector(weight))]
        attributes = {"epsilon": self.spec.norm_epsilon}
        outputs = [ir.Value(name=None), ir.Value(name=""), ir.Value(name=""), ir.Value(name=None)]
        self.tape.op_multi_out("SkipSimplifiedLayerNormalization", inputs, attributes, outputs=outputs, domain=_CONTRIB)
        return outputs[0], outputs[3]

    def product(self, x: ir.Value, roles: Sequence[str], layer: int) -> ir.Value:
        return self.weight_product(x, *(self.name(role, layer) for role in roles))

    def weight_product(self, x: ir.Value, *names: str) -> ir.Value:
        """The product of `x` with weights [rows, columns], transposed; with several as one, which reads `x` once."""
        if self.weights.dtype not in BITS:
            return self.op("FusedMatMul", x, self.held(self.weights.exact(*names)), domain=_CONTRIB, transB=1)
        values, scales, matrix = self.weights.quantized(*names)
        return self.op(
            "MatMulNBits",
            x,
            self.held(values),
            self.held(scales),
            domain=_CONTRIB,
            K=matrix.columns,
            N=matrix.values.shape[0],
            bits=matrix.bits,
            block_size=matrix.block_size,
            accuracy_level=_INT8_INPUTS if self.float == ir.DataType.FLOAT else 0,
        )

    def biased(self, x: ir.Value, roles: Sequence[str], layer: int) -> ir.Value:
        biases = [f"{role}_bias" for role in roles]
        if not all(self.has(bias) for bias in biases):
            return x
        return self.op("Add", x, self.held(self.weights.vector(*(self.name(bias, layer) for bias in biases))))

    def attention(self, normed: ir.Value, layer: int) -> ir.Value:
        """Attention of each token over its sequence, [batch, tokens, heads · head dim]."""
        spec, roles = self.spec, ("q", "k", "v")
        joined = self.biased(self.product(normed, roles, layer), roles, layer)
        parts: Sequence[ir.Value | None] = (joined, None, None)
        if self.has("q_norm"):
            query, key, value = self.split(joined, [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)])
            parts = (self.head_norm(query, "q_norm", layer), self.head_norm(key, "k_norm", layer), value)
        past = [self.input(f"{kind}.{layer}", self.float, *self.cache_shape()) for kind in ("key", "value")]
        attributes = {"num_heads": spec.heads, "kv_num_heads": spec.kv_heads, "do_rotary": 1, "scale": spec.head_dim**-0.5}
        if spec.sliding_window is not None:
            attributes["local_window_size"] = spec.sliding_window
        inputs = [*parts, *past, self.last, self.longest, *self.angles()]
        attended, key_out, value_out = self.tape.op_multi_out(
            "GroupQueryAttention", inputs, attributes, num_outputs=3, domain=_CONTRIB
        )
        self.output(key_out, self.float, f"key.{layer}.out", *self.cache_shape())
        self.output(value_out, self.float, f"value.{layer}.out", *self.cache_shape())
        return attended

    def cache_shape(self) -> tuple[int | str, ...]:
        return "batch", self.spec.kv_heads, "capacity", self.spec.head_dim

    def head_norm(self, x: ir.Value, role: str, layer: int) -> ir.Value:
        """The norm over each head of [batch, tokens, heads · head dim]."""
        heads = self.norm(self.reshape(x, 0, 0, -1, self.spec.head_dim), self.name(role, layer))
        return self.reshape(heads, 0, 0, -1)

    def angles(self) -> tuple[ir.Value, ir.Value]:
        """Cosine and sine [context, head dim / 2] of each position."""
        if "cosine" not in self.weights.arrays:
            angle = np.arange(self.context, dtype=np.float32)[:, None] * self.spec.rope.inverse_frequencies()
            magnitude = np.float32(self.spec.rope.magnitude)
            self.weights.keep("cosine", (magnitude * np.cos(angle)).astype(self.weights.compute))
            self.weights.keep("sine", (magnitude * np.sin(angle)).astype(self.weights.compute))
        return self.held("cosine"), self.held("sine")

    def feed_forward(self, normed: ir.Value, layer: int) -> ir.Value:
        gate, up = self.split(self.product(normed, ("gate", "up"), layer), [self.spec.intermediate_size] * 2)
        gated = self.op("QuickGelu", gate, domain=_CONTRIB, alpha=1.0)  # with this alpha it is SiLU
        return self.product(self.op("Mul", gated, up), ("down",), layer)


def _shape(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Shape:
    return ir.Shape(array.shape)
