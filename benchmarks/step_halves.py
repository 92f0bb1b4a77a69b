"""Steps of five to eight decoding sequences with short weights, whole and in halves, in turn.

    python benchmarks/step_halves.py FOLDER [--dtype int8] [--repeats 40]

Behind one token each. Whether halves are quicker depends on the processor: where memory is what limits, they are not, so that
`openvino` tries both when it loads a model, and never halves where the processor multiplies bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

from measuring import report
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.openvino.halving import SIZES, decoding
from penstock.backends.registry import backends
from penstock.cli.huge_pages import start_again_with_huge_pages


def main() -> None:
    start_again_with_huge_pages()  # as an executor does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtype", type=DType, default=DType.INT8, choices=[DType.BF16, DType.INT8, DType.INT4])
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    spec = read_model(options.model, options.model.name)
    model = backends()["openvino"].create(spec, DeviceConfig(dtype=options.dtype, kv_cache_bytes=1 << 30))
    found = {}
    for count in SIZES:
        batch, times = decoding(count), {False: [], True: []}
        for repeat in range(2 * options.repeats + 2):
            way = bool(repeat % 2)
            with patch.object(model, "_halves", way):
                began = time.perf_counter()
                model.step(batch)
            if repeat > 1:  # the first two make kernels
                times[way].append((time.perf_counter() - began) * 1000)
        whole, halved = (statistics.median(times[way]) for way in (False, True))
        found[str(count)] = {"whole_ms": round(whole, 1), "halves_ms": round(halved, 1), "ratio": round(whole / halved, 3)}
    model.close()
    report("step_halves", {"steps": found, "dtype": options.dtype, "repeats": options.repeats})


if __name__ == "__main__":
    main()
