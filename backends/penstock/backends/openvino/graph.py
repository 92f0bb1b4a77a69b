"""The graph of one step of a decoder, in the forms that the CPU plug-in recognises.

RMS norm and rotary embedding are written as their patterns (`RMSFusion`, `RoPEFusionGPTNEOX` in OpenVINO's common transformations),
so each becomes one operation; a weight of 8 or 4 bits is a constant, a conversion and scales, which the plug-in keeps compressed.
One in bfloat16 is that without scales where the processor does not multiply it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import openvino as ov
from openvino import opset13 as ops
from openvino.op import _PagedAttentionExtension as PagedAttention
from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.openvino.weights import Constants

__all__ = ["build"]

_INDICES = ov.Type.i32


def build(spec: DecoderSpec, constants: Constants) -> ov.Model:
    """The graph of one step.

    Its inputs are named as the fields of `StepBatch`, besides `embedded` (float32 [tokens, hidden], in place of the tokens' ids),
    `longest` (int32, tokens of the longest sequence) and, for each layer, `key.LAYER` and `value.LAYER`: the cache, whose type and
    shape the plug-in fills in when it compiles. Its one output is float32 [rows, vocabulary].
    """
    return _Builder(spec, constants).build()


class _Builder:
    def __init__(self, spec: DecoderSpec, constants: Constants) -> None:
        self.spec, self.constants = spec, constants
        self.inputs: list[Any] = []
        self.shapes = spec.weight_shapes()

    def build(self) -> ov.Model:
        spec, names = self.spec, self.spec.weights
        hidden = self.input("embedded", ov.Type.f32, self.spec.hidden_size)
        self.cos, self.sin = self.angles(self.input("positions", ov.Type.i64))
        rows = self.input("logits_rows", ov.Type.i64)
        self.placement = [self.input(name, _INDICES) for name in ("past_lengths", "starts", "block_ids", "block_starts")]
        self.longest = self.input("longest", _INDICES, rank=0)
        for layer in range(spec.layers):
            attended = self.attention(hidden, layer)
            if layer == spec.layers - 1:  # what follows no other token sees
                attended, hidden = ops.gather(attended, rows, _axis(0)), ops.gather(hidden, rows, _axis(0))
            hidden = self.feed_forward(self.attention_output(hidden, attended, layer), layer)
        head = names.lm_head or names.embedding
        logits = _product(self.norm(hidden, names.final_norm), self.constants.head(head), self.rows(head))
        return ov.Model([ops.result(logits)], self.inputs, spec.architecture)

    def input(self, name: str, dtype: ov.Type, *width: int, rank: int = 1) -> Any:
        parameter = ops.parameter(ov.PartialShape([-1] * rank + list(width)), dtype)
        parameter.output(0).set_names({name})
        self.inputs.append(parameter)
        return parameter

    def name(self, role: str, layer: int) -> str:
        name: str = getattr(self.spec.weights.layer, role)
        return name.format(layer=layer)

    def has(self, role: str) -> bool:
        return getattr(self.spec.weights.layer, role, None) is not None

    def angles(self, positions: Any) -> tuple[Any, Any]:
        """Cosine and sine [tokens, 1, 1, head dim] of each dimension's angle."""
        frequencies = self.spec.rope.inverse_frequencies()
        both = np.concatenate([frequencies, frequencies])[None, None, None]
        angle = ops.multiply(_reshape(ops.convert(positions, "f32"), -1, 1, 1, 1), ops.constant(both))
        cosine, sine = ops.cos(angle), ops.sin(angle)
        magnitude = self.spec.rope.magnitude
        return (
            (cosine, sine) if magnitude == 1 else (ops.multiply(cosine, _scalar(magnitude)), ops.multiply(sine, _scalar(magnitude)))
        )

    def norm(self, x: Any, name: str) -> Any:
        mean = ops.reduce_mean(ops.power(x, _scalar(2)), ops.constant(np.array([-1])), keep_dims=True)
        inverse = ops.power(ops.sqrt(ops.add(mean, _scalar(self.spec.norm_epsilon))), _scalar(-1))
        return ops.multiply(self.constants.vector(name), ops.multiply(x, inverse))

    def product(self, x: Any, *names: str) -> Any:
        return _product(x, self.constants.matrix(*names), self.rows(*names))

    def rows(self, *names: str) -> int:
        """Of these matrices, one below the other."""
        return sum(self.shapes[name][0] for name in names)

    def products(self, x: Any, roles: Sequence[str], widths: Sequence[int], layer: int) -> list[Any]:
        """The products of `x` with the weights of these roles, with their biases where they have any.

        They are computed as one, which reads `x` once and keeps all threads at work for longer: decoding in bfloat16 is 3 to 7 %
        faster than with each alone, where the joined weights lie in huge pages.
        """
        joined = self.biased(self.product(x, *(self.name(role, layer) for role in roles)), roles, layer)
        if len(roles) == 1:
            return [joined]
        return list(ops.variadic_split(joined, _axis(1), ops.constant(np.array(widths))).outputs())

    def biased(self, x: Any, roles: Sequence[str], layer: int) -> Any:
        biases = [f"{role}_bias" for role in roles]
        if not all(self.has(bias) for bias in biases):
            return x
        return ops.add(x, self.constants.vector(*(self.name(bias, layer) for bias in biases)))

    def attention(self, hidden: Any, layer: int) -> Any:
        """Attention of each token over its sequence, [tokens, heads · head dim]."""
        spec = self.spec
        widths = [heads * spec.head_dim for heads in (spec.heads, spec.kv_heads, spec.kv_heads)]
        query, key, value = self.products(self.norm(hidden, self.name("input_norm", layer)), "qkv", widths, layer)
        query = self.rotated(query, spec.heads, "q_norm", layer)
        key = self.rotated(key, spec.kv_heads, "k_norm", layer)
        return self.paged_attention(query, key, value, layer)

    def rotated(self, x: Any, heads: int, norm: str, layer: int) -> Any:
        half = self.spec.head_dim // 2
        x = _reshape(x, -1, heads, 1, self.spec.head_dim)
        if self.has(norm):
            x = self.norm(x, self.name(norm, layer))
        low, high = ops.variadic_split(x, _axis(3), ops.constant(np.array([half, half]))).outputs()
        turned = ops.concat([ops.multiply(high, _scalar(-1)), low], -1)
        x = ops.add(ops.multiply(x, self.cos), ops.multiply(turned, self.sin))
        return _reshape(x, -1, heads * self.spec.head_dim)

    def paged_attention(self, query: Any, key: Any, value: Any, layer: int) -> Any:
        spec = self.spec
        cache = [self.input(f"{kind}.{layer}", ov.Type.dynamic, rank=4) for kind in ("key", "value")]
        none, none_f32, zero = _empty(np.int32), _empty(np.float32), ops.constant(np.int32(0))
        arguments = {
            "query": query,
            "key": key,
            "value": value,
            "key_cache": cache[0],
            "value_cache": cache[1],
            **dict(zip(("past_lens", "subsequence_begins", "block_indices", "block_indices_begins"), self.placement, strict=True)),
            "scale": _scalar(spec.head_dim**-0.5),
            "sliding_window": ops.constant(np.int32(spec.sliding_window or 0)),
            "alibi_slopes": none_f32,
            "max_context_len": self.longest,
            "score_aggregation_window": none,
            "rotated_block_indices": none,
            "rotation_deltas": none,
            "rotation_trig_lut": none_f32,
            "xattention_threshold": none_f32,
            "xattention_block_size": zero,
            "xattention_stride": zero,
            "sinks": _empty(np.float32, rank=4),
            "adaptive_rkv_start_size": zero,
            "adaptive_rkv_evictable_sizes": none,
            "adaptive_rkv_diversity_block_set_indices": none,
            "adaptive_rkv_diversity_block_set_indices_begins": none,
            "token_type_ids": none,
            "qq_bias": _empty(np.uint8),
            "qq_bias_begins": none,
        }
        attention = PagedAttention([a if isinstance(a, ov.Output) else a.output(0) for a in arguments.values()])
        for kind in "kv":
            attention.get_rt_info()[f"num_{kind}_heads"] = spec.kv_heads
            attention.get_rt_info()[f"{kind}_head_size"] = spec.head_dim
        return attention.output(0)

    def attention_output(self, hidden: Any, attended: Any, layer: int) -> Any:
        (out,) = self.products(attended, "o", [self.spec.hidden_size], layer)
        return ops.add(hidden, out)

    def feed_forward(self, hidden: Any, layer: int) -> Any:
        normed = self.norm(hidden, self.name("post_attention_norm", layer))
        gate, up = self.products(normed, ("gate", "up"), [self.spec.intermediate_size] * 2, layer)
        return ops.add(hidden, self.product(ops.multiply(ops.swish(gate), up), self.name("down", layer)))


def _product(x: Any, matrix: Any, rows: int) -> Any:
    """A product with weights, float32 (to the plug-in, which computes in the precision that it is told).

    Of the matrix, the first `rows` count; there may be others behind them.
    """
    if matrix.get_output_shape(0)[0] != rows:
        return ops.slice(ops.matmul(x, matrix, False, True), *(ops.constant(np.array([n])) for n in (0, rows, 1, 1)))
    dtype = matrix.get_element_type()
    if dtype == ov.Type.f32:
        return ops.matmul(x, matrix, False, True)
    # The operand is converted, not the weight: a converted constant that is not marked is folded, and held twice as large.
    return ops.convert(ops.matmul(ops.convert(x, dtype), matrix, False, True), "f32")


def _axis(axis: int) -> Any:
    return ops.constant(np.array(axis))


def _scalar(value: float) -> Any:
    return ops.constant(np.float32(value))


def _reshape(x: Any, *shape: int) -> Any:
    return ops.reshape(x, ops.constant(np.array(shape)), special_zero=False)


def _empty(dtype: type[np.generic], rank: int = 1) -> Any:
    return ops.constant(np.zeros((0,) * rank, dtype))
