"""What a decoder is: the one description that every model family gives and every backend builds from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["DecoderSpec", "LayerWeights", "Rope", "RopeScaling", "SamplingDefaults", "WeightNames", "Yarn"]


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of low frequencies (The Llama 3 Herd of Models, 2024; the ``llama3`` rope type of checkpoints)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_length: int


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN's stretching (Peng et al., 2023): dimensions that turn often keep their frequency, those that turn seldom are slowed.

    Attributes:
        factor: by which the slow ones are slowed.
        fast: turns within the original context from which a dimension keeps its frequency.
        slow: turns up to which it is slowed by the whole factor; between the two, by a ramp.
        original_context_length: that the model was trained with.
        whole_dimensions: whether the ramp begins and ends at whole dimensions.
    """

    factor: float
    fast: float
    slow: float
    original_context_length: int
    whole_dimensions: bool = True

    def kept(self, theta: float, dim: int) -> NDArray[np.float64]:
        """How much of its frequency each pair of dimensions keeps, [dim / 2], between 0 and 1."""
        first, last = (
            dim * math.log(self.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (self.fast, self.slow)
        )
        if self.whole_dimensions:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        width = last - first or 0.001
        return 1 - np.clip((np.arange(dim // 2, dtype=np.float64) - first) / width, 0, 1)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al., 2021), halves rotated against each other.

    Attributes:
        theta: the base of the wavelengths.
        dim: of a head, how many dimensions are rotated.
        scaling: Llama 3's, if any.
        linear_factor: by which every frequency is slowed.
        yarn: YaRN's stretching, if any.
        magnitude: by which cosine and sine are multiplied.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None
    linear_factor: float = 1.0
    yarn: Yarn | None = None
    magnitude: float = 1.0

    def inverse_frequencies(self) -> NDArray[np.float32]:
        """Radians per position, [dim / 2]."""
        inverse = self.theta ** -(np.arange(0, self.dim, 2, dtype=np.float64) / self.dim) / self.linear_factor
        if self.scaling is not None:
            s = self.scaling
            wavelength = 2 * math.pi / inverse
            low, high = s.original_context_length / s.low_frequency_factor, s.original_context_length / s.high_frequency_factor
            smooth = (s.original_context_length / wavelength - s.low_frequency_factor) / (
                s.high_frequency_factor - s.low_frequency_factor
            )
            blended = (1 - smooth) * inverse / s.factor + smooth * inverse
            inverse = np.where(wavelength > low, inverse / s.factor, np.where(wavelength < high, inverse, blended))
        if self.yarn is not None:
            kept = self.yarn.kept(self.theta, self.dim)
            inverse = inverse / self.yarn.factor * (1 - kept) + inverse * kept
        return inverse.astype(np.float32)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Names of one layer's tensors, each with ``{layer}`` in it. None where the family has no such tensor."""

    input_norm: str
    q: str
    k: str
    v: str
    o: str
    post_attention_norm: str
    gate: str
    up: str
    down: str
    q_bias: str | None = None
    k_bias: str | None = None
    v_bias: str | None = None
    o_bias: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Names of a checkpoint's tensors. ``lm_head`` is None where the embedding is tied."""

    embedding: str
    final_norm: str
    lm_head: str | None
    layer: LayerWeights


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A pre-norm decoder with RMS norms, rotary positions, grouped-query attention and a SwiGLU feed-forward.

    Attributes:
        architecture: the family's name, ``llama`` for example.
        context_length: tokens that prompt and answer may hold together.
        sliding_window: tokens that attention reaches, the one that attends among them; None: all.
        eos_token_ids: ids that end an answer unless a request ignores them.
    """

    architecture: str
    vocabulary_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    norm_epsilon: float
    rope: Rope
    weights: WeightNames
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def tied_embeddings(self) -> bool:
        """Whether the embedding is the output projection too."""
        return self.weights.lm_head is None

    def weight_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The name and the shape of every tensor that the checkpoint must hold."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        per_layer = {
            "input_norm": (hidden,),
            "q": (q, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, q),
            "post_attention_norm": (hidden,),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
            "q_bias": (q,),
            "k_bias": (kv,),
            "v_bias": (kv,),
            "o_bias": (hidden,),
            "q_norm": (self.head_dim,),
            "k_norm": (self.head_dim,),
        }
        shapes: dict[str, tuple[int, ...]] = {
            self.weights.embedding: (self.vocabulary_size, hidden),
            self.weights.final_norm: (hidden,),
        }
        if self.weights.lm_head is not None:
            shapes[self.weights.lm_head] = (self.vocabulary_size, hidden)
        for role, shape in per_layer.items():
            name: str | None = getattr(self.weights.layer, role)
            if name is not None:
                shapes |= {name.format(layer=i): shape for i in range(self.layers)}
        return shapes


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What ``generation_config.json`` says of sampling. None: nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
