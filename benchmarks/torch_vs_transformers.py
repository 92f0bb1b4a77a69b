"""Penstock's engine on the torch backend and transformers' `generate` in turn, on the same work.

    python torch_vs_transformers.py FOLDER [--dtype bf16|f32]

Each loads in a process of its own and waits while the other one works. A line of JSON a scenario, as of `engine_vs_genai.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from engine_vs_genai import Engine, compare
from workload import SCENARIOS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="which; all without it")
    options = parser.parse_args()
    folder = str(options.folder.resolve())
    ours = Engine(sys.executable, "worker_penstock.py", folder, options.dtype, "torch")
    peer = Engine(sys.executable, "worker_transformers.py", folder, options.dtype)
    for name in options.scenario or SCENARIOS:
        requests, prompt, new = SCENARIOS[name]
        pairs = [compare(ours, peer, name, seed) for seed in range(options.repeats)]
        best_ours, best_peer = (min(wall for wall, _ in side) for side in zip(*pairs, strict=True))
        tokens = requests * (new if new > 1 else prompt)
        result = {
            "scenario": name,
            "dtype": options.dtype,
            "penstock_tok_s": round(tokens / best_ours, 1),
            "transformers_tok_s": round(tokens / best_peer, 1),
            "ratio_of_best": round(best_peer / best_ours, 3),
            "median_ratio": round(statistics.median(theirs[0] / own[0] for own, theirs in pairs), 3),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
