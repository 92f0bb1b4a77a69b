"""Qwen3 checkpoints as GGUF files, every matrix in one quantisation, for `run_llama_cpp.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors reads into
import numpy as np
from safetensors import safe_open

__all__ = ["write_gguf"]

_NORMAL, _UNUSED = 1, 5  # token types of the format


def write_gguf(folder: Path, path: Path, quantisation: str) -> None:
    """Write `path` from a checkpoint of one shard; `quantisation` is a name of gguf's, such as q8_0.

    Raises:
        ValueError: the checkpoint is of another family.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "qwen3":
        raise ValueError(f"{folder}: model_type must be qwen3, and is {config['model_type']}")
    writer = gguf.GGUFWriter(path, "qwen3")
    _write_shape(writer, config)
    _write_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text())["model"], config["vocab_size"])
    kind = gguf.GGMLQuantizationType[quantisation.upper()]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", "numpy") as weights:
        for name in weights.keys():  # noqa: SIM118 - no mapping, for all that it looks like one
            target = names.get_name(name, try_suffixes=(".weight",))
            if name == "lm_head.weight" and config.get("tie_word_embeddings"):
                continue
            array = np.asarray(weights.get_tensor(name)).astype(np.float32)
            if array.ndim == 1:
                writer.add_tensor(target, array)
            else:
                writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_vocabulary(writer: gguf.GGUFWriter, bpe: dict[str, Any], size: int) -> None:
    """A byte-level BPE's tokens, and names for the ids that the tokenizer leaves unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    for text, i in bpe["vocab"].items():
        tokens[i] = text
    used = set(bpe["vocab"].values())
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([_NORMAL if i in used else _UNUSED for i in range(size)])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]])
