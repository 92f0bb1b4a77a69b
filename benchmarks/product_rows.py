"""What products with int8 weights take by their rows, as they are and as steps are padded.

    python benchmarks/product_rows.py MODEL [ROWS …] [--repeats 7]

MODEL is a folder; of it only the shape is used. The two products of a layer's feed-forward, in OpenVINO, set up as its backend does
for a processor without bfloat16. Each number of rows and the one that `penstock.backends.openvino.padding` makes of it are computed
in turn; milliseconds of both, medians, and their ratio: above 1 says that the padded one is quicker.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops

from measuring import report
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DType
from penstock.backends.openvino.padding import quick_count
from penstock.backends.openvino.properties import properties

# Among them the worst that were found, and some that padding can only make slower.
ROWS = (70, 83, 91, 119, 121, 143, 200, 249, 300, 325, 400, 497, 498, 511, 520, 1003, 1016, 1500, 2008, 2032)


class Product:
    """A product of `inputs` values a row with a matrix of eight bits."""

    def __init__(self, outputs: int, inputs: int, settings: dict[str, object]) -> None:
        random = np.random.default_rng(0)
        x = ops.parameter(ov.PartialShape([-1, inputs]), ov.Type.f32)
        weight = ops.constant(random.integers(-127, 128, (outputs, inputs), np.int8))
        scale = ops.constant(random.random((outputs, 1), np.float32))
        product = ops.matmul(x, ops.multiply(ops.convert(weight, "f32"), scale), transpose_a=False, transpose_b=True)
        model = ov.Model([ops.result(product)], [x], "product")
        self.inputs = inputs
        self.request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()

    def seconds(self, rows: int) -> float:
        """Of one run, behind another one that has made the kernel."""
        self.request.set_input_tensor(ov.Tensor(np.ones((rows, self.inputs), np.float32)))
        self.request.infer()
        began = time.perf_counter()
        self.request.infer()
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    decoder = read_model(options.model, options.model.name).decoder
    settings = dict(properties(decoder, DType.INT8, len(os.sched_getaffinity(0)), has_bf16=False))
    del settings["KV_CACHE_PRECISION"]
    wide, hidden = decoder.intermediate_size, decoder.hidden_size
    products = [Product(2 * wide, hidden, settings), Product(hidden, wide, settings)]
    found: dict[str, object] = {}
    for rows in options.rows:
        seconds: dict[int, list[float]] = {rows: [], quick_count(rows): []}
        for _ in range(options.repeats):
            for count, times in seconds.items():
                times.append(sum(product.seconds(count) for product in products))
        medians = {count: statistics.median(times) * 1000 for count, times in seconds.items()}
        padded = medians[quick_count(rows)]
        found[str(rows)] = {
            "padded_to": quick_count(rows),
            "ms": round(medians[rows], 2),
            "padded_ms": round(padded, 2),
            "ratio": round(medians[rows] / padded, 3),
        }
    report("product_rows", {"rows": found, "repeats": options.repeats})


if __name__ == "__main__":
    main()
