"""A checkpoint of Qwen3-0.6B's shape with random weights, in Hugging Face's format: 596 million parameters, 1.2 GB in bfloat16.

    python benchmarks/random_checkpoint.py FOLDER [--small]

`--small` writes one of 79 million parameters, for loads that have to last many requests. Speed does not depend on what weights say.
The tokenizer is a byte-level BPE of 16,000 tokens, trained on Python's own library.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.backends.architectures.families import read_decoder

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
}
SMALL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
DEVIATION = 0.02
TOKENS, END = 16_000, "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    config = {**CONFIG, **(SMALL if arguments.small else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    write_weights(config, folder / "model.safetensors")


def tokenizer() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    files = sorted(str(path) for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train(files, trainers.BpeTrainer(vocab_size=TOKENS, initial_alphabet=alphabet, special_tokens=[END], show_progress=False))
    return bpe


def write_weights(config: dict[str, Any], path: Path) -> None:
    """One safetensors file: length of the header, header, tensors end to end."""
    shapes = read_decoder(config).weight_shapes()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in shapes.items():
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors(shapes.values()):
            file.write(tensor.tobytes())


def tensors(shapes: Iterable[tuple[int, ...]]) -> Iterator[NDArray[Any]]:
    """Normal matrices, and norms of one."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        drawn = rng.standard_normal(shape, np.float32) * DEVIATION if len(shape) > 1 else np.ones(shape, np.float32)
        yield drawn.astype(ml_dtypes.bfloat16)


if __name__ == "__main__":
    main()
