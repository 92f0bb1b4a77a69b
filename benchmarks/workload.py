"""The work that engines are compared on, and the loop of a worker that `engine_vs_genai.py` drives."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

# name: requests submitted together, tokens of each prompt, new tokens of each
SCENARIOS = {
    "prefill-512": (1, 512, 1),
    "decode-b1": (1, 16, 65),
    "decode-b8": (8, 16, 65),
    "decode-b32": (32, 16, 65),
    "mixed-b16": (16, 256, 64),
}


def prompts(requests: int, tokens: int, seed: int) -> list[list[int]]:
    """Random token ids: speed does not depend on what they say."""
    rng = random.Random(seed)
    return [[rng.randrange(100, 15000) for _ in range(tokens)] for _ in range(requests)]


def serve(run: Callable[[list[list[int]], int], object]) -> None:
    """Time `run(prompts, new tokens)` for each line `SCENARIO SEED` on standard input."""
    for line in sys.stdin:
        name, seed = line.split()
        requests, tokens, new = SCENARIOS.get(name, (2, 32, 4))
        work = prompts(requests, tokens, int(seed))
        wall, processor = time.perf_counter(), time.process_time()
        run(work, new)
        print(f"seconds {time.perf_counter() - wall} {time.process_time() - processor}", flush=True)
