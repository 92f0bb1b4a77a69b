"""The decoder of a `DecoderSpec` as modules: the one tree for every family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.pytorch.attention import AttentionPlan

__all__ = ["Decoder"]


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        unit = functional.rms_norm(x.float(), self.weight.shape, None, self._epsilon)
        return unit.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions over a paged cache."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        names, hidden, dim = spec.weights.layer, spec.hidden_size, spec.head_dim
        self.q = nn.Linear(hidden, spec.heads * dim, bias=names.q_bias is not None)
        self.k = nn.Linear(hidden, spec.kv_heads * dim, bias=names.k_bias is not None)
        self.v = nn.Linear(hidden, spec.kv_heads * dim, bias=names.v_bias is not None)
        self.o = nn.Linear(spec.heads * dim, hidden, bias=names.o_bias is not None)
        self.q_norm = RmsNorm(dim, spec.norm_epsilon) if names.q_norm is not None else nn.Identity()
        self.k_norm = RmsNorm(dim, spec.norm_epsilon) if names.k_norm is not None else nn.Identity()
        self._dim = dim

    def forward(self, x: Tensor, turn: Tensor, plan: AttentionPlan, cache: Tensor) -> Tensor:
        queries, keys, values = (project(x).unflatten(-1, (-1, self._dim)) for project in (self.q, self.k, self.v))
        queries, keys = rotate(self.q_norm(queries), turn), rotate(self.k_norm(keys), turn)
        attended: Tensor = self.o(plan.attend(queries, keys, values, cache).flatten(1))
        return attended


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_norm = RmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.attention = Attention(spec)
        self.post_attention_norm = RmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.feed_forward = FeedForward(spec)

    def forward(self, x: Tensor, turn: Tensor, plan: AttentionPlan, cache: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x), turn, plan, cache)
        out: Tensor = x + self.feed_forward(self.post_attention_norm(x))
        return out


class Decoder(nn.Module):
    """Token ids in, logits of chosen rows out. Made on the ``meta`` device: the weights come from a checkpoint."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.vocabulary_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.final_norm = RmsNorm(spec.hidden_size, spec.norm_epsilon)
        self.lm_head = nn.Linear(spec.hidden_size, spec.vocabulary_size, bias=False)

    def forward(self, ids: Tensor, angles: Tensor, rows: Tensor, plan: AttentionPlan, cache: Tensor) -> Tensor:
        """One step.

        Args:
            ids: [T].
            angles: float32 [T, head dim / 2], by which each pair of a head's elements is turned.
            rows: [R], where logits are wanted.
            plan: which rows of the cache are written and read.
            cache: [layers, 2 (key, value), slots, kv heads, head dim].

        Returns:
            float32 [R, vocabulary].
        """
        x: Tensor = self.embedding(ids)
        turn = torch.stack((angles.cos(), angles.sin()))[:, :, None]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = layer(x, turn, plan, layer_cache)
        logits: Tensor = self.lm_head(self.final_norm(x[rows]))
        return logits.float()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions: the halves of each head turned against each other.

    Args:
        x: [T, heads, dim].
        turn: float32 [2 (cosine, sine), T, 1, dim / 2].
    """
    (low, high), (cosine, sine) = x.float().chunk(2, dim=-1), turn
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1).to(x.dtype)
