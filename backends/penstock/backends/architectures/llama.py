"""Llama 2 and 3 (Touvron et al., 2023; The Llama 3 Herd of Models, 2024), and what is built like them."""

from __future__ import annotations

from penstock.backends.architectures.config import Config, decoder_spec, layer_weights
from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["read"]


def read(config: Config) -> DecoderSpec:
    """The decoder that a ``LlamaForCausalLM`` configuration describes."""
    bias = config.boolean("attention_bias")
    return decoder_spec(config, "llama", layer_weights(qkv_bias=bias, o_bias=bias))
