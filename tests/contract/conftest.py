"""Checkpoints with random small weights, written by transformers: the independent implementation to agree with."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # wide, so that greedy choices are clear
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Checkpoint:
    """A folder and what transformers makes of it."""

    name: str
    folder: Path
    model: PreTrainedModel


VARIANTS: dict[str, Callable] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-3-rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": lambda: LlamaConfig(
        **SIZES, attention_bias=True, rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    ),
    "qwen2-yarn": lambda: Qwen2Config(**SIZES, rope_parameters=YARN_ROPE),
    "llama-sharded": lambda: LlamaConfig(**SIZES),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=24),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
}
"""Every family, and each way in which checkpoints of one differ."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> Callable[[str], Checkpoint]:
    """The checkpoint of a name of `VARIANTS`, written once."""
    written: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        if name not in written:
            written[name] = write(name, tmp_path_factory.mktemp(name))
        return written[name]

    return get


def write(name: str, folder: Path) -> Checkpoint:
    torch.manual_seed(sorted(VARIANTS).index(name))
    model = AutoModelForCausalLM.from_config(VARIANTS[name](), dtype=torch.float32).eval()
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name or "norm" in parameter_name:  # transformers begins with zeros and ones, which hide mistakes
            torch.nn.init.normal_(parameter, 0.0 if "bias" in parameter_name else 1.0, 0.2)
    model.save_pretrained(folder, max_shard_size="200KB" if "sharded" in name else "1GB")
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}))
    return Checkpoint(name, folder, model)
