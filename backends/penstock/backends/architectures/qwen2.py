"""Qwen2 and 2.5 (Qwen2 Technical Report, 2024): Llama with biases on the query, key and value projections."""

from __future__ import annotations

from penstock.backends.architectures.config import Config, decoder_spec, layer_weights
from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["read", "sliding_window"]

# What the configuration classes of Qwen take where a key is absent.
_DEFAULT_WINDOW = 4096
_DEFAULT_FULL_LAYERS = 28


def read(config: Config) -> DecoderSpec:
    """The decoder that a ``Qwen2ForCausalLM`` configuration describes."""
    return decoder_spec(config, "qwen2", layer_weights(qkv_bias=True), sliding_window=sliding_window(config))


def sliding_window(config: Config) -> int | None:
    """The window of all layers, for Qwen2 and Qwen3 alike; layers that differ are refused."""
    if not config.boolean("use_sliding_window") or config.is_null("sliding_window"):
        return None
    layers = config.integer("num_hidden_layers")
    kinds = config.strings("layer_types")
    if kinds:
        if set(kinds) == {"full_attention"}:
            return None
        if set(kinds) != {"sliding_attention"} or len(kinds) != layers:
            raise config.error("layer_types", "must be the same for every layer: layers that differ are not built")
        return config.integer("sliding_window", _DEFAULT_WINDOW)
    full = config.whole("max_window_layers", _DEFAULT_FULL_LAYERS)
    if full >= layers:
        return None
    if full > 0:
        raise config.error("max_window_layers", f"must be 0 or at least {layers}: layers that differ are not built")
    return config.integer("sliding_window", _DEFAULT_WINDOW)
