"""A checkpoint's folder, read into a `ModelSpec` before a weight is touched; every way that it can be wrong is one line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.backends.architectures.config import Config
from penstock.backends.architectures.families import UnsupportedConfig, read_decoder
from penstock.backends.architectures.spec import DecoderSpec, SamplingDefaults
from penstock.backends.contract import ModelSpec
from penstock.backends.fingerprint import fingerprint
from penstock.backends.safetensors import CheckpointError, TensorEntry, Weights, read_header

__all__ = ["CheckpointError", "Weights", "read_model"]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WEIGHT_TYPES = ("F32", "BF16", "F16")
# Buffers that old exporters wrote among the weights, computed anew here.
_COMPUTED = ".rotary_emb.inv_freq"
# Less may be 0 in single precision, which keeps no token.
_LEAST_TOP_P = 1e-6
_MOST_TOP_K = 2**32 - 1


def read_model(folder: Path, name: str, *, cache: Path | None = None, known: str | None = None) -> ModelSpec:
    """Read what a folder holds from its configuration and its weights' headers, and then, for its identity, the weights' bytes.

    Args:
        folder: with config.json, tokenizer.json and model.safetensors or its shards and their index.
        name: under which the model is served.
        cache: folder in which digests of files are kept for the next time; None: nowhere.
        known: its fingerprint, where somebody has just computed it.

    Raises:
        CheckpointError: it can not be served, and why.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name one that holds a checkpoint")
    values = _read_json(folder / "config.json")
    try:
        decoder = read_decoder(values)
        eos, defaults = _read_generation(folder / "generation_config.json")
    except UnsupportedConfig as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: tokenizer.json is missing; save the fast tokenizer beside the weights")
    shards = _find_shards(folder)
    entries = _read_headers(folder, shards)
    _check_tensors(folder, decoder, entries)
    return ModelSpec(
        name=name,
        folder=folder,
        fingerprint=known or fingerprint(values, entries, cache),
        decoder=replace(decoder, eos_token_ids=eos) if eos else decoder,
        shards=shards,
        defaults=defaults,
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent}: {path.name} is missing; is this the folder of a checkpoint?") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def _read_generation(path: Path) -> tuple[tuple[int, ...], SamplingDefaults]:
    """End-of-answer ids and sampling defaults; ``do_sample: false`` is a temperature of 0."""
    if not path.is_file():
        return (), SamplingDefaults()
    config = Config(_read_json(path), "generation_config.json: ")
    greedy = not config.boolean("do_sample", default=True)
    top_k = config.whole("top_k", 0)
    if top_k > _MOST_TOP_K:
        raise config.error("top_k", f"must be from 0 to {_MOST_TOP_K}")
    return config.token_ids("eos_token_id"), SamplingDefaults(
        temperature=0.0 if greedy else _within(config, "temperature", 0, 100),
        top_p=_within(config, "top_p", _LEAST_TOP_P, 1),
        top_k=top_k or None,
        min_p=_within(config, "min_p", 0, 1),
        repetition_penalty=_within(config, "repetition_penalty", 0.01, 10),
    )


def _within(config: Config, key: str, low: float, high: float) -> float | None:
    """A default that no request's validator sees again, so that it must be one which can be sampled by."""
    value = config.amount(key)
    if value is not None and not low <= value <= high:
        raise config.error(key, f"must be from {low} to {high}")
    return value


def _find_shards(folder: Path) -> tuple[Path, ...]:
    if (folder / _SINGLE).is_file():
        return (folder / _SINGLE,)
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise CheckpointError(f"{folder}: only pickled weights ({pickles[0]}), which are never read: safetensors are needed")
        raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there")
    names = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
        raise CheckpointError(f"{folder / _INDEX}: weight_map must say the file, in the same folder, of each tensor")
    shards = tuple(folder / name for name in sorted(set(names.values())))
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} of {len(shards)} shards missing; fetch the checkpoint again")
    return shards


def _read_headers(folder: Path, shards: tuple[Path, ...]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for shard in shards:
        for name, entry in read_header(shard).items():
            if name in entries:
                raise CheckpointError(f"{folder}: {name} stands in {entries[name].shard.name} and in {shard.name}")
            entries[name] = entry
    return entries


def _check_tensors(folder: Path, decoder: DecoderSpec, entries: Mapping[str, TensorEntry]) -> None:
    expected = decoder.weight_shapes()
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise CheckpointError(f"{folder}: tensor {name} {list(shape)} is missing")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.shard}: tensor {name} is {list(entry.shape)}; config.json says {list(shape)}")
        if entry.dtype not in _WEIGHT_TYPES:
            raise CheckpointError(f"{entry.shard}: tensor {name} is {entry.dtype}; expected one of {', '.join(_WEIGHT_TYPES)}")
    for name in entries.keys() - expected.keys():
        if not name.endswith(_COMPUTED) and not (decoder.tied_embeddings and name == "lm_head.weight"):
            raise CheckpointError(f"{entries[name].shard}: tensor {name} has no place in the {decoder.architecture} of config.json")
