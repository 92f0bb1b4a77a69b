"""The decoder in float64 with neither cache nor batch: what the formulas say, as plainly as numpy can."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["Truth", "log_softmax", "reference"]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Truth:
    """What a decoder makes of T tokens.

    Attributes:
        logits: behind each, [T, vocabulary].
        kv: of each, in the canonical layout: [layer, 2 (key, value), T, kv head, head dim].
    """

    logits: Array
    kv: Array


def log_softmax(logits: NDArray[Any]) -> Array:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    out: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return out


def reference(spec: DecoderSpec, weights: Mapping[str, NDArray[Any]], ids: Sequence[int]) -> Truth:
    """Compute a decoder over these tokens."""
    names, count = spec.weights, len(ids)

    def weight(name: str) -> Array:
        return weights[name].astype(np.float64)

    def norm(x: Array, name: str) -> Array:
        unit: Array = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + spec.norm_epsilon)
        return unit * weight(name)

    def linear(x: Array, role: str) -> Array:
        bias = getattr(names.layer, f"{role}_bias", None)
        out: Array = x @ weight(getattr(names.layer, role).format(layer=layer)).T
        return out if bias is None else out + weight(bias.format(layer=layer))

    def heads(x: Array, role: str, position: Array | None) -> Array:
        """[heads, T, dim], normalised and turned where the family does so."""
        x = linear(x, role).reshape(count, -1, spec.head_dim)
        normed: str | None = getattr(names.layer, f"{role}_norm", None)
        x = x if normed is None else norm(x, normed.format(layer=layer))
        return (x if position is None else _rotate(x, position, spec.rope.magnitude)).transpose(1, 0, 2)

    positions: NDArray[np.int64] = np.arange(count)
    angles: Array = positions[:, None].astype(np.float64) * spec.rope.inverse_frequencies().astype(np.float64)
    distance = positions[:, None] - positions[None]
    seen = (distance >= 0) & (distance < (spec.sliding_window or count))
    x = weights[names.embedding][np.asarray(ids)].astype(np.float64)
    kv = np.empty((spec.layers, 2, count, spec.kv_heads, spec.head_dim))
    for layer in range(spec.layers):
        h = norm(x, names.layer.input_norm.format(layer=layer))
        keys, values = heads(h, "k", angles), heads(h, "v", None)
        kv[layer] = keys.transpose(1, 0, 2), values.transpose(1, 0, 2)
        x = x + linear(_attend(heads(h, "q", angles), keys, values, seen), "o")
        h = norm(x, names.layer.post_attention_norm.format(layer=layer))
        gate = linear(h, "gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, "up"), "down")
    logits: Array = norm(x, names.final_norm) @ weight(names.lm_head or names.embedding).T
    return Truth(logits, kv)


def _rotate(x: Array, angles: Array, magnitude: float) -> Array:
    """Rotary positions (Su et al., 2021), the halves of each head turned against each other."""
    low, high = np.split(x, 2, -1)
    cosine, sine = magnitude * np.cos(angles)[:, None], magnitude * np.sin(angles)[:, None]
    return np.concatenate((low * cosine - high * sine, high * cosine + low * sine), -1)


def _attend(queries: Array, keys: Array, values: Array, seen: NDArray[np.bool_]) -> Array:
    """Softmax attention, queries of several heads sharing a KV head; [T, heads x dim]."""
    shared = len(queries) // len(keys)
    keys, values = keys.repeat(shared, 0), values.repeat(shared, 0)
    scores = np.where(seen, queries @ keys.transpose(0, 2, 1) / np.sqrt(queries.shape[-1]), -np.inf)
    likely = np.exp(scores - scores.max(-1, keepdims=True))
    attended: Array = (likely / likely.sum(-1, keepdims=True)) @ values
    return attended.transpose(1, 0, 2).reshape(queries.shape[1], -1)
