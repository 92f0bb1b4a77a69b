"""Placements per second of the scheduler's core, and whether a long queue makes them dearer: prints one JSON object.

Every executor is full and the queue holds its length throughout: each round one lease ends, one request is placed, and one request
arrives. Rounds with a short and a long queue alternate, and medians are told. With `--prefill` that many more executors prefill for
the others, all are calibrated, and each request's way is decided by its costs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections import deque
from pathlib import Path

from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.model import Description, Grant, Needs, Role

MODEL = "m"
FIELDS = ("sampling.temperature", "sampling.top_p", "stopping.max_tokens")
BLOCK = 16
TIMES = StepTimes(
    prefill=Curve((16, 128, 512), (0.01, 0.06, 0.23)),
    prefill_pair_seconds=1e-8,
    decode=Curve((1, 8, 32), (0.01, 0.02, 0.04)),
    decode_context=256,
    decode_token_seconds=1e-7,
)


class Load:
    """A scheduler with full executors and `queued` requests behind them; `prefill` more executors prefill for these."""

    def __init__(self, queued: int, executors: int, tenants: int, batch: int, prefill: int) -> None:
        # Nobody sends heartbeats here.
        config = SchedulerConfig(settle_seconds=0.0, look_ahead=0, lease_seconds=1e6, max_queued_requests=2 * queued)
        self._core = Scheduler(config, time.monotonic)
        self._random = random.Random(0)
        self._ids = itertools.count()
        self._tenants = [f"tenant-{i}" for i in range(tenants)]
        self._prefixes = [tuple(self._random.getrandbits(64) for _ in range(8)) for _ in range(64)]
        for i in range(executors):
            self._join(f"executor-{i}", batch, Role.DECODE if prefill else Role.BOTH)
        for i in range(prefill):
            self._join(f"prefill-{i}", 4 * batch, Role.PREFILL)
        self._gateway = self._core.open_gateway()
        self._leased: deque[int] = deque()
        self.placed = self.apart = 0
        for _ in range(executors * batch + queued):
            self._arrive()
        self._take(executors * batch)
        if self._core.queued != queued:
            raise RuntimeError(f"{self._core.queued} queued, not {queued}")

    def _join(self, executor_id: str, batch: int, role: Role) -> None:
        description = Description(
            executor_id=executor_id,
            address="127.0.0.1:1",
            model=MODEL,
            context_length=32_768,
            kv_block_size=BLOCK,
            kv_blocks=1 << 20,
            max_batch_size=batch,
            fields=frozenset(FIELDS),
            model_fingerprint="v1",
            features=frozenset({"export_kv", "import_kv"}),
            times=TIMES,
            role=role,
        )
        executor = self._core.executors.join(description)
        stored = [block for prefix in self._random.sample(self._prefixes, 8) for block in prefix]
        self._core.executors.kv_events(executor, 1, stored=stored, removed=(), cleared=False)

    def _arrive(self) -> None:
        needs = Needs(
            model=MODEL,
            prompt_tokens=200,
            max_tokens=self._random.randint(16, 256),
            block_hashes=self._random.choice(self._prefixes),
            fields=FIELDS,
            tenant=self._random.choice(self._tenants),
            deadline=3600.0 + self._random.random() * 60,
        )
        self._core.place(self._gateway, next(self._ids), needs)

    def _take(self, count: int) -> None:
        grants = [o for o in self._core.step() if isinstance(o, Grant)]
        if len(grants) != count:
            raise RuntimeError(f"{len(grants)} placed, not {count}")
        self._leased.extend(grant.request_id for grant in grants)
        self.placed += count
        self.apart += sum(grant.prefill is not None for grant in grants)

    def run(self, placements: int) -> float:
        """Seconds per placement."""
        begun = time.perf_counter()
        for _ in range(placements):
            self._core.release(self._gateway, self._leased.popleft())
            self._arrive()
            self._take(1)
        return (time.perf_counter() - begun) / placements


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, nargs=2, default=(100, 10_000), help="a short and a long queue")
    parser.add_argument("--executors", type=int, default=8)
    parser.add_argument("--prefill", type=int, default=0, help="executors that prefill for the others")
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--placements", type=int, default=10_000, help="per round")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    loads = {queued: Load(queued, args.executors, args.tenants, args.batch, args.prefill) for queued in args.queued}
    for load in loads.values():
        load.run(args.placements)
    seconds: dict[int, list[float]] = {queued: [] for queued in loads}
    for _ in range(args.rounds):
        for queued, load in loads.items():
            seconds[queued].append(load.run(args.placements))
    short, long = (statistics.median(seconds[queued]) for queued in args.queued)
    split = {str(queued): round(load.apart / load.placed, 3) for queued, load in loads.items()}
    print(json.dumps(_report(args, seconds, long / short) | {"placed_apart": split}))


def _report(args: argparse.Namespace, seconds: dict[int, list[float]], ratio: float) -> dict[str, object]:
    return {
        "benchmark": "scheduler_placements",
        "placements_per_second": {str(q): round(1 / statistics.median(s)) for q, s in seconds.items()},
        "microseconds_per_placement": {
            str(q): {"median": round(statistics.median(s) * 1e6, 2), "min": round(min(s) * 1e6, 2), "max": round(max(s) * 1e6, 2)}
            for q, s in seconds.items()
        },
        "cost_ratio": round(ratio, 3),
        "settings": {k: getattr(args, k) for k in ("executors", "prefill", "tenants", "batch", "placements", "rounds")},
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version()},
        "penstock": importlib.metadata.version("penstock"),
    }


def _processor() -> str:
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            return next(line.split(":", 1)[1].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
