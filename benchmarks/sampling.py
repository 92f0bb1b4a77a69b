"""What sampling costs in one step: 32 rows of a vocabulary of 151,936, by parameters and shape of the distribution.

python benchmarks/sampling.py [--rows 32] [--vocabulary 151936]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from penstock.executor.sampling import Adjustment, Row, Sampler, SamplingParameters

CASES = {
    "greedy": SamplingParameters(temperature=0),
    "temperature": SamplingParameters(temperature=0.8),
    "temperature, top-p": SamplingParameters(temperature=0.8, top_p=0.95),
    "temperature, top-p 0.5": SamplingParameters(temperature=0.8, top_p=0.5),
    "temperature, top-p, min-p": SamplingParameters(temperature=0.8, top_p=0.95, min_p=0.05),
    "temperature, top-k 20, top-p": SamplingParameters(temperature=0.6, top_k=20, top_p=0.95),
    "temperature, top-p, penalties": SamplingParameters(temperature=0.8, top_p=0.95, presence_penalty=0.5, repetition_penalty=1.1),
}
# Standard deviation of the logits: of random weights, and of a trained model.
SHAPES = {"flat": 0.5, "peaked": 4.0}


def main() -> None:
    """Print one JSON line per case and shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    sampler = Sampler(options.vocabulary)
    generator = np.random.default_rng(0)
    for shape, deviation in SHAPES.items():
        logits = generator.normal(0, deviation, (options.rows, options.vocabulary)).astype(np.float32)
        for case, parameters in CASES.items():
            for logprobs in (None, 5):
                print(
                    json.dumps(
                        {
                            "case": case,
                            "shape": shape,
                            "logprobs": logprobs,
                            **measure(sampler, logits, parameters, logprobs, options.steps),
                        }
                    )
                )


def measure(
    sampler: Sampler, logits: np.typing.NDArray[np.float32], parameters: SamplingParameters, logprobs: int | None, steps: int
) -> dict[str, float]:
    """Milliseconds of one step: the best and the median."""
    prompt = range(100, 600)
    times = []
    for step in range(steps):
        rows = [
            Row(
                parameters,
                step * len(logits) + i,
                Adjustment(parameters, prompt, ()) if Adjustment.needed(parameters) else None,
                (),
                logprobs,
            )
            for i in range(len(logits))
        ]
        fresh = logits.copy()
        began = time.perf_counter()
        sampler.sample(fresh, rows)
        times.append((time.perf_counter() - began) * 1e3)
    return {"ms_best": round(min(times), 2), "ms_median": round(statistics.median(times), 2)}


if __name__ == "__main__":
    main()
