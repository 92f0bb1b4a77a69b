"""Tries a small decoder on each device that the runtime names: what is not computed here is not offered.

Run as a module, it writes what it found, a JSON object a line, to the file whose descriptor is its argument.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType, ModelSpec
from penstock.backends.onnxruntime.model import OnnxRuntimeModel
from penstock.backends.onnxruntime.providers import HOST, Target, accelerators

__all__ = ["TRIED", "Attempt", "decode", "prove", "small_decoder"]

Attempt = Callable[[Target, DType], NDArray[np.float32]]
"""Logits of a small decoder with weights of a type on a device; raises whatever the runtime raises."""

TRIED = (DType.BF16, DType.F32, DType.INT8, DType.INT4)
"""Types of weights, the preferred one first: accelerators are quick in bfloat16; rounded ones have to be asked for."""

# Root mean square of the error over that of the logits: what the short types lose, and no wrong answer comes near.
_TOLERANCE = 5e-2
# Shapes that kernels for real models take: heads of 64, and rows that divide into the longest blocks of rounded weights.
_SIZES = {"num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "attention_bias": True}


def small_decoder(folder: Path) -> ModelSpec:
    """A layer of random weights that has every operator which the graph may have."""
    return write_checkpoint(folder, {**CONFIGS["qwen3"], **_SIZES, "num_key_value_heads": 2})


def decode(spec: ModelSpec, target: Target, dtype: DType) -> NDArray[np.float32]:
    """Logits of two prompts side by side, of a chunk behind one, of both going on when a gap was closed, and behind moved KV."""
    decoder = spec.decoder
    lane = decoder.layers * 2 * 64 * decoder.kv_heads * decoder.head_dim * 4
    config = DeviceConfig(threads=1, kv_cache_bytes=4 * lane, max_batch_tokens=64, max_batch_size=4, max_context=64)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary_size, (3, 12)).tolist()
    model = OnnxRuntimeModel(spec, config, dtype, target)
    try:
        driver = Driver(model)
        first, between, last = (driver.sequence() for _ in range(3))
        found = driver.step(*(Piece(s, i) for s, i in zip((first, between, last), ids, strict=True)))
        found += driver.step(Piece(last, ids[0][:5]))
        for token in ids[1][:3]:
            found += driver.step(Piece(first, [token]), Piece(last, [token]))
        chunk = model.export_kv(first.blocks, range(first.length))
        driver.extend(copy := driver.sequence(), first.length)
        model.import_kv(copy.blocks, chunk)
        copy.length = first.length
        return np.concatenate([*found, *driver.step(Piece(copy, ids[2][:1]))])
    finally:
        model.close()


def prove(targets: Iterable[Target], attempt: Attempt) -> Iterator[dict[str, Any]]:
    """Hold devices against the CPU.

    Yields:
        device and type of weights before they are tried, and again with ``fault``: None, or why the device is not to be used so.
    """
    for target in targets:
        for dtype in TRIED:
            trial = {"device": target.device, "dtype": dtype.value}
            yield trial
            yield trial | {"fault": _fault(attempt, target, dtype)}


def _fault(attempt: Attempt, target: Target, dtype: DType) -> str | None:
    if target.memory is None:
        return f"the memory of {target.provider} has no addresses, by which alone the cache can be bound"
    try:
        found = attempt(target, dtype)
    except Exception as error:  # noqa: BLE001  whatever a provider raises is why it is not used
        return " ".join(str(error).split()) or type(error).__name__
    right = attempt(HOST, DType.F32 if dtype is DType.BF16 else dtype)
    if found.shape != right.shape:
        return f"gives logits of shape {found.shape}, not {right.shape}"
    off = float(np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)))
    return None if off <= _TOLERANCE else f"its logits are off by {off:.2g} of their size"


def main(fd: int) -> None:
    """Prove every device and write what was found, each line as soon as it is known."""
    with tempfile.TemporaryDirectory(prefix="penstock-") as folder:
        spec = small_decoder(Path(folder) / "model")
        for proof in prove(accelerators(ort.get_available_providers()), cache(partial(decode, spec))):
            os.write(fd, json.dumps(proof).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
