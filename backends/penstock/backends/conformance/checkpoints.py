"""Small checkpoints with random weights, one for each way in which families differ, written with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penstock.backends.architectures.families import read_decoder
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import ModelSpec

__all__ = ["CONFIGS", "write_checkpoint"]

_SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
}
_LLAMA3: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN: Mapping[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

# The least that is one: the checks speak in ids.
_TOKENIZER = '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}'

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {**_SIZES, "architectures": ["LlamaForCausalLM"], "rope_scaling": _LLAMA3, "attention_bias": True},
    "mistral": {**_SIZES, "architectures": ["MistralForCausalLM"], "sliding_window": 40, "num_key_value_heads": 1},
    "qwen2": {**_SIZES, "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "rope_scaling": _YARN},
    "qwen3": {**_SIZES, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "num_key_value_heads": 4},
}
"""config.json of a small model of each family."""


def write_checkpoint(folder: Path, config: Mapping[str, Any], seed: int = 0) -> ModelSpec:
    """Write a model of random float32 weights into an empty folder.

    Args:
        folder: where to.
        config: its config.json.
        seed: of the weights.

    Returns:
        what reading it back gives.
    """
    random = np.random.default_rng(seed)
    tensors = {name: _random(random, name, shape) for name, shape in read_decoder(config).weight_shapes().items()}
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor.tobytes() for tensor in tensors.values())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "tokenizer.json").write_text(_TOKENIZER, encoding="utf-8")
    return read_model(folder, folder.name)


def _random(random: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Weights that keep the size of what goes through them; biases and norms that are no zeros and ones, which hide mistakes."""
    if len(shape) == 1:
        return random.normal(0.0 if name.endswith("bias") else 1.0, 0.2, shape).astype(np.float32)
    return (random.normal(0, 1, shape) / (1 if "embed" in name else np.sqrt(shape[1]))).astype(np.float32)
