"""Mistral (Jiang et al., 2023): Llama with a window that slides over the past."""

from __future__ import annotations

from penstock.backends.architectures.config import Config, decoder_spec, layer_weights
from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["read"]

# What the configuration class takes where the key is absent; null says that there is no window.
_DEFAULT_WINDOW = 4096


def read(config: Config) -> DecoderSpec:
    """The decoder that a ``MistralForCausalLM`` configuration describes."""
    if config.strings("layer_types"):
        raise config.error("layer_types", "must be absent: Mistral's layers are all of one kind")
    window = None if config.is_null("sliding_window") else config.integer("sliding_window", _DEFAULT_WINDOW)
    return decoder_spec(config, "mistral", layer_weights(), sliding_window=window)
