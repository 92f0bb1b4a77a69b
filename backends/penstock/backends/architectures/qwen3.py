"""Qwen3, dense (Qwen3 Technical Report, 2025): Llama with RMS norms over each head of queries and keys."""

from __future__ import annotations

from penstock.backends.architectures.config import Config, decoder_spec, layer_weights
from penstock.backends.architectures.qwen2 import sliding_window
from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["read"]

# What the configuration class takes where the key is absent, whatever the hidden size.
_DEFAULT_HEAD_DIM = 128


def read(config: Config) -> DecoderSpec:
    """The decoder that a ``Qwen3ForCausalLM`` configuration describes."""
    bias = config.boolean("attention_bias")
    layer = layer_weights(qkv_bias=bias, o_bias=bias, qk_norm=True)
    return decoder_spec(config, "qwen3", layer, sliding_window=sliding_window(config), head_dim=_DEFAULT_HEAD_DIM)
