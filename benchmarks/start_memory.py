"""What a start takes: seconds, and the most memory that the process held, for each type of weights.

    python start_memory.py FOLDER [--dtype int4 ...]

Each start is a process of its own; quantised types start twice, the second time with the weights that the first one kept. A line
of JSON a start: seconds until the model has run its first step, and the peak of resident memory over what the same process held
after it had loaded the built-in model, as a multiple of the weights as served: in the type that they are held in, the logits'
matrix included and the table of embeddings not. The KV cache is not touched before the first request.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import report
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType, ModelSpec
from penstock.backends.registry import backends
from penstock.common.sources import resolve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", type=DType, nargs="+", default=list(DType))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # the cache folder; set by this script itself
    options = parser.parse_args()
    if options.worker:
        _start(options.folder, options.dtype[0], options.worker)
        return
    spec = read_model(options.folder, "model")
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory() as cache:
            for start in ("first", "second") if dtype.quantised else ("every",):
                seconds, before, peak = _in_a_process(options.folder, dtype, cache)
                served = _served(spec, dtype)
                figures = {
                    "seconds": round(seconds, 2),
                    "peak_mb": round(peak / 1e6),
                    "runtime_mb": round(before / 1e6),
                    "weights_as_served_mb": round(served / 1e6),
                    "ratio": round((peak - before) / served, 3),
                }
                report(f"{dtype}, {start} start", figures)


def _in_a_process(folder: Path, dtype: DType, cache: str) -> tuple[float, int, int]:
    command = [sys.executable, __file__, str(folder), "--dtype", dtype, "--worker", cache]
    seconds, before, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-3:]
    return float(seconds), int(before), int(peak)


def _start(folder: Path, dtype: DType, cache: Path) -> None:
    """Load the built-in model and then this one; print seconds of the second, and the peak of memory behind each, in bytes."""
    _create(resolve("builtin"), dtype, None)
    before, began = _peak(), time.perf_counter()
    _create(folder, dtype, cache)
    print(time.perf_counter() - began, before, _peak())


def _create(folder: Path, dtype: DType, cache: Path | None) -> None:
    spec = read_model(folder, "model")
    backends()["openvino"].create(spec, DeviceConfig(dtype=dtype, kv_cache_bytes=64 << 20, weight_cache=cache)).close()


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def _served(spec: ModelSpec, dtype: DType) -> float:
    """Bytes of the matrices that products read, and of their scales and zero points."""
    whole = {DType.F32: 4, DType.BF16: 2, DType.INT8: 1, DType.INT4: 0.5 + 5 / 128}[dtype]
    names, shapes = spec.decoder.weights, spec.decoder.weight_shapes()
    head = names.lm_head or names.embedding
    products = sum(math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name not in (names.embedding, head))
    return products * whole + math.prod(shapes[head]) * max(whole, 1)


if __name__ == "__main__":
    main()
