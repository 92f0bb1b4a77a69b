"""Steps of five to eight decoding sequences with weights of eight bits, whole and in halves, in turn.

    python benchmarks/step_halves.py FOLDER [--past 40] [--repeats 40]

Whether halves are quicker depends on the processor: where memory is what limits, they are not, so that `openvino` tries both.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from measuring import report
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType, GenerativeModel, StepBatch
from penstock.backends.openvino.halving import SIZES, Halving
from penstock.backends.registry import backends
from penstock.cli.huge_pages import start_again_with_huge_pages


def decoding(model: GenerativeModel, count: int, past: int) -> StepBatch:
    """A step of `count` sequences behind `past` tokens each, of the zeros that the cache begins with."""
    each = np.arange(count + 1, dtype=np.int32)
    blocks = -(-(past + 1) // model.kv.block_size)
    return StepBatch(
        token_ids=np.zeros(count, np.int64),
        positions=np.full(count, past, np.int64),
        past_lengths=np.full(count, past, np.int32),
        starts=each,
        block_ids=np.arange(count * blocks, dtype=np.int32),
        block_starts=each * np.int32(blocks),
        logits_rows=np.arange(count, dtype=np.int64),
    )


def main() -> None:
    start_again_with_huge_pages()  # as an executor does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--past", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=40)
    options = parser.parse_args()
    spec = read_model(options.model, options.model.name)
    model = backends()["openvino"].create(spec, DeviceConfig(dtype=DType.INT8, kv_cache_bytes=1 << 30))
    found = {}
    for count in SIZES:
        batch, times = decoding(model, count, options.past), {False: [], True: []}
        for repeat in range(2 * options.repeats + 2):
            way = bool(repeat % 2)
            with patch.object(Halving, "wanted", lambda *_, way=way: way):
                began = time.perf_counter()
                model.step(batch)
            if repeat > 1:  # the first two make kernels
                times[way].append((time.perf_counter() - began) * 1000)
        whole, halved = (statistics.median(times[way]) for way in (False, True))
        found[str(count)] = {"whole_ms": round(whole, 1), "halves_ms": round(halved, 1), "ratio": round(whole / halved, 3)}
    model.close()
    report("step_halves", {"steps": found, "past": options.past, "repeats": options.repeats})


if __name__ == "__main__":
    main()
