"""What it takes to copy KV out of a backend's cache and into it, beside a memcpy of the same bytes.

    python kv_copies.py [--backend openvino torch …] [--kv-dtype int8] [--dtype bf16] [--tokens 640]

The cache has the shape of Qwen3-0.6B's (28 layers, 8 kv heads of 128 dimensions); the model around it is small, since it computes
nothing here. A sequence lies in blocks that are scattered over the cache, and its KV is copied out and into other blocks: in the
canonical layout, and as blocks where the backend has a native form. A line of JSON each: GB/s of what goes over (median, least and
greatest), and that as a share of a memcpy of the same bytes between memory that has been touched, taken in turn with it: of the
medians, and of the fastest, which say more where others use the machine too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from measuring import report, spread
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import CANONICAL_DTYPES, DeviceConfig, DType, GenerativeModel, KvChunk, NativeKv
from penstock.backends.registry import backends

_SHAPE = {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", nargs="+", default=["openvino", "torch", "onnxruntime"])
    parser.add_argument("--dtype", type=DType, default=DType.F32)
    parser.add_argument("--kv-dtype", type=DType)
    parser.add_argument("--tokens", type=int, default=640)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        spec = write_checkpoint(Path(folder) / "shape", {**CONFIGS["qwen3"], **_SHAPE, "max_position_embeddings": 4096})
        for name in options.backend:
            config = DeviceConfig(options.dtype, kv_cache_bytes=1 << 30, kv_cache_dtype=options.kv_dtype, max_context=4096)
            model = backends()[name].create(spec, config)
            try:
                _measure(name, model, options.tokens, options.repeats)
            finally:
                model.close()


def _measure(name: str, model: GenerativeModel, tokens: int, repeats: int) -> None:
    kv, random = model.kv, np.random.default_rng(0)
    needed = -(-tokens // kv.block_size)
    blocks = random.permutation(kv.blocks)[: 2 * needed].tolist()
    source, target = blocks[:needed], blocks[needed:]
    values = random.standard_normal(kv.canonical_shape(tokens), np.float32).astype(CANONICAL_DTYPES[kv.canonical_dtype])
    given = KvChunk(range(tokens), values)
    model.import_kv(source, given)
    model.import_kv(target, given)
    calls: dict[str, Callable[[], Any]] = {
        "canonical out": lambda: model.export_kv(source, range(tokens)),
        "canonical in": lambda: model.import_kv(target, given),
    }
    sizes = dict.fromkeys(calls, given.data.nbytes)
    if isinstance(model, NativeKv) and kv.native_layout:
        native: NativeKv = model
        data = native.export_blocks(source)
        calls |= {"native out": lambda: native.export_blocks(source), "native in": lambda: native.import_blocks(target, data)}
        sizes |= dict.fromkeys(("native out", "native in"), data.nbytes)
    for what, call in calls.items():
        copied, memcpy = _in_turn(call, sizes[what], repeats)
        figures = {
            "cache": kv.dtype,
            "mib": round(sizes[what] / (1 << 20), 1),
            "gb_per_second": spread([sizes[what] / seconds / 1e9 for seconds in copied]),
            "memcpy_gb_per_second": spread([sizes[what] / seconds / 1e9 for seconds in memcpy]),
            "share_of_memcpy": round(statistics.median(memcpy) / statistics.median(copied), 3),
            "share_of_memcpy_at_best": round(min(memcpy) / min(copied), 3),
        }
        report(f"{name}, {what}", figures)


def _in_turn(call: Callable[[], Any], size: int, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of a call, and of a memcpy of so many bytes."""
    read, written = np.ones(size, np.uint8), np.ones(size, np.uint8)
    copied, memcpy = [], []
    for _ in range(repeats):
        copied.append(_timed(call))
        memcpy.append(_timed(lambda: _copy(read, written)))
    return copied, memcpy


def _copy(read: NDArray[np.uint8], written: NDArray[np.uint8]) -> None:
    written[:] = read


def _timed(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
