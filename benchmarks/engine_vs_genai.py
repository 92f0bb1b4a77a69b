"""Penstock's engine and OpenVINO GenAI's continuous batching in turn, on the same work.

    python engine_vs_genai.py FOLDER int8|int4|bf16 --peer-python /path/to/python

Each engine loads in a process of its own and waits while the other one works, so that both see the same machine. A line of JSON a
scenario: tokens/s in the best run of each, the ratio of those, the median of the ratios of neighbouring runs, and the ratio of the
processor time of the best runs, which says most on a machine that others use too. The peer needs openvino-genai,
optimum-intel, nncf and torch in an environment of its own (`--peer-python`); the checkpoint is exported beside itself once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from workload import SCENARIOS

HERE = Path(__file__).parent


class Engine:
    """A worker process that answers each line `SCENARIO SEED` with the seconds that it took: of the wall, of the processors."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HERE)
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit(f"no pipes to {command}")
        self.questions, self.answers = self.process.stdin, self.process.stdout
        self.ask("warm-up", 0)

    def ask(self, scenario: str, seed: int) -> tuple[float, float]:
        self.questions.write(f"{scenario} {seed}\n")
        self.questions.flush()
        for line in self.answers:  # what else a library prints is skipped
            if line.startswith("seconds "):
                _, wall, processor = line.split()
                return float(wall), float(processor)
        raise SystemExit(f"{self.process.args} ended with {self.process.wait()}")


def compare(ours: Engine, peer: Engine, scenario: str, seed: int) -> tuple[tuple[float, float], tuple[float, float]]:
    """One run of each, the other one first every other time."""
    if seed % 2:
        theirs = peer.ask(scenario, seed)
        return ours.ask(scenario, seed), theirs
    return ours.ask(scenario, seed), peer.ask(scenario, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype", choices=["int8", "int4", "bf16"])
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the peer's environment")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scenario", action="append", choices=list(SCENARIOS), help="which; all without it")
    options = parser.parse_args()
    folder = str(options.folder)
    ours = Engine(sys.executable, "worker_penstock.py", folder, options.dtype)
    peer = Engine(options.peer_python, "worker_genai.py", folder, options.dtype)
    for name in options.scenario or SCENARIOS:
        requests, prompt, new = SCENARIOS[name]
        pairs = [compare(ours, peer, name, seed) for seed in range(options.repeats)]
        (best_ours, own_cpu), (best_peer, peer_cpu) = (map(min, zip(*side, strict=True)) for side in zip(*pairs, strict=True))
        tokens = requests * (new if new > 1 else prompt)
        result = {
            "scenario": name,
            "dtype": options.dtype,
            "penstock_tok_s": round(tokens / best_ours, 1),
            "genai_tok_s": round(tokens / best_peer, 1),
            "ratio_of_best": round(best_peer / best_ours, 3),
            "median_ratio": round(statistics.median(theirs[0] / own[0] for own, theirs in pairs), 3),
            "processor_time_ratio": round(peer_cpu / own_cpu, 3),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
