"""The decoder of a `DecoderSpec` as modules: the one tree for every family."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.pytorch.attention.plan import AttentionPlan

__all__ = ["Decoder"]


class RmsNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich, 2019); the weight may differ between heads."""

    def __init__(self, epsilon: float, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        unit = functional.rms_norm(x.float(), x.shape[-1:], None, self._epsilon)
        return unit.to(x.dtype).mul_(self.weight)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023) with rotary positions over a paged cache.

    One product makes queries, keys and values; queries and keys are normalised and turned together.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        names, hidden, dim = spec.weights.layer, spec.hidden_size, spec.head_dim
        both, biased = spec.heads + spec.kv_heads, any((names.q_bias, names.k_bias, names.v_bias))
        self.qkv = nn.Linear(hidden, (both + spec.kv_heads) * dim, bias=biased)
        self.o = nn.Linear(spec.heads * dim, hidden, bias=names.o_bias is not None)
        self.qk_norm = RmsNorm(spec.norm_epsilon, both, dim) if names.q_norm is not None else nn.Identity()
        self._heads, self._dim = (spec.heads, spec.kv_heads), dim

    def forward(self, x: Tensor, turn: Tensor, plan: AttentionPlan, cache: Tensor, rows: Tensor | None) -> Tensor:
        heads, kv_heads = self._heads
        both, values = torch.split(self.qkv(x).unflatten(-1, (-1, self._dim)), [heads + kv_heads, kv_heads], dim=1)
        queries, keys = torch.split(rotate(self.qk_norm(both), turn), [heads, kv_heads], dim=1)
        attended = plan.attend(queries, keys, values, cache).flatten(1)
        out: Tensor = self.o(attended if rows is None else attended[rows])
        return out


class FeedForward(nn.Module):
    """SwiGLU (Shazeer, 2020), its two inner products as one."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_up = nn.Linear(spec.hidden_size, 2 * spec.intermediate_size, bias=False)
        self.down = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(functional.silu(gate) * up)
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a residual."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_norm = RmsNorm(spec.norm_epsilon, spec.hidden_size)
        self.attention = Attention(spec)
        self.post_attention_norm = RmsNorm(spec.norm_epsilon, spec.hidden_size)
        self.feed_forward = FeedForward(spec)

    def forward(self, x: Tensor, turn: Tensor, plan: AttentionPlan, cache: Tensor, rows: Tensor | None) -> Tensor:
        attended = self.attention(self.input_norm(x), turn, plan, cache, rows)
        x = (x if rows is None else x[rows]) + attended
        out: Tensor = x + self.feed_forward(self.post_attention_norm(x))
        return out


class Decoder(nn.Module):
    """Token ids in, logits of chosen rows out. Made on the ``meta`` device: the weights come from a checkpoint.

    Activations have the type of the norms' weights, which may be longer than that of the products'.
    """

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.magnitude = spec.rope.magnitude
        self.embedding = nn.Embedding(spec.vocabulary_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))
        self.final_norm = RmsNorm(spec.norm_epsilon, spec.hidden_size)
        self.lm_head: nn.Module = nn.Linear(spec.hidden_size, spec.vocabulary_size, bias=False)

    def forward(self, ids: Tensor, angles: Tensor, rows: Tensor | None, plan: AttentionPlan, cache: Tensor) -> Tensor:
        """One step.

        Args:
            ids: [T].
            angles: float32 [T, head dim / 2], by which each pair of a head's elements is turned.
            rows: [R], where logits are wanted; None: everywhere.
            plan: which rows of the cache are written and read.
            cache: [layers, 2 (key, value), blocks, block size, kv heads, head dim].

        Returns:
            float32 [R, vocabulary].
        """
        x: Tensor = self.embedding(ids).to(self.final_norm.weight.dtype)
        turn = self.magnitude * torch.stack((angles.cos(), angles.sin()))[:, :, None]
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            # Behind the last layer's attention no token sees another: the rest is computed for the rows that are asked for alone.
            x = layer(x, turn, plan, cache[i], rows if i == last else None)
        logits: Tensor = self.lm_head(self.final_norm(x))
        return logits.float()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions: the halves of each head turned against each other.

    Args:
        x: [T, heads, dim].
        turn: float32 [2 (cosine, sine), T, 1, dim / 2].
    """
    cosine, sine = turn
    halves = torch.unflatten(x.float(), -1, (2, -1))
    # In place: for a long prompt each intermediate result is megabytes, and memory is what is waited for.
    turned = halves * cosine[..., None, :]
    turned[..., 0, :].addcmul_(halves[..., 1, :], sine, value=-1)
    turned[..., 1, :].addcmul_(halves[..., 0, :], sine)
    out: Tensor = turned.flatten(-2).to(x.dtype)
    return out
