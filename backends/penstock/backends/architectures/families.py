"""Which family reads which configuration. A new family is a file beside this one and a line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from penstock.backends.architectures import llama, mistral, qwen2, qwen3
from penstock.backends.architectures.config import Config, UnsupportedConfig
from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["FAMILIES", "UnsupportedConfig", "read_decoder"]

FAMILIES: Mapping[str, Callable[[Config], DecoderSpec]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": mistral.read,
    "Qwen2ForCausalLM": qwen2.read,
    "Qwen3ForCausalLM": qwen3.read,
}


def read_decoder(values: Mapping[str, Any]) -> DecoderSpec:
    """The decoder that a config.json describes.

    Raises:
        UnsupportedConfig: no family has this architecture, or a key asks for something that is not built.
    """
    config = Config(values)
    named = config.strings("architectures")
    read = FAMILIES.get(named[0]) if named else None
    if read is None:
        known = ", ".join(sorted(FAMILIES))
        raise config.error("architectures", f"must name one of {known}")
    config.refuse("auto_map", unless=None, why="must be absent: code that comes with a checkpoint is never run")
    return read(config)
