"""Goodput of prefill and decode together, apart and as the scheduler chooses, under one open-loop load.

    python benchmarks/random_checkpoint.py FOLDER --small
    python benchmarks/goodput.py FOLDER [--rate 1 2 4] [--duration 60] [--rounds 3]

Requests arrive at random and do not wait for each other: most chat (short prompts, longer answers), some bring long prompts.
One is good if its first token and its later ones, on average, come in time. `together` is one executor, with the prefill chunk
that did best on a load of its own before; `apart` and `auto` are one executor for prefill and one for decode, and differ in the
scheduler's policy alone. Every executor may use all cores. All clusters stay up; each round loads one after the other with the
same requests, in random order. Ratios are of the medians over rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import statistics
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from measuring import Suite, report, spread, suite
from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.bench.measure import warm
from penstock.cli.bench.scenarios import Poisson, Request
from penstock.cli.bench.timeline import Slo, Timeline, latencies, meets

CHUNKS = (64, 128, 256, 512)
CHAT, LONG = (96, 64), (1536, 16)  # prompt tokens and answer tokens, on average
LONG_SHARE = 0.25
SPREAD = 0.3


@dataclass
class Cluster:
    """A running suite and what it has been measured to do, by rate."""

    name: str
    target: GrpcTarget
    http: str
    good_per_second: dict[float, list[float]] = field(default_factory=dict)
    timelines: dict[float, list[Timeline]] = field(default_factory=dict)

    def load(self, work: Sequence[Request], rate: float, duration: float, slo: Slo) -> None:
        timelines = self.target.run(work, lambda: None)
        failed = [t.error for t in timelines if t.error]
        if failed:
            print(f"{self.name}: {len(failed)} of {len(work)} failed, the first: {failed[0]}", file=sys.stderr)
        self.good_per_second.setdefault(rate, []).append(sum(meets(t, slo) for t in timelines) / duration)
        self.timelines.setdefault(rate, []).extend(timelines)

    def goodput(self, rate: float) -> float:
        return statistics.median(self.good_per_second[rate])

    def placed(self) -> dict[str, int]:
        """Requests placed so far, by how."""
        text = urllib.request.urlopen(f"http://{self.http}/metrics").read().decode()
        counts: dict[str, int] = {}
        for labels, value in re.findall(r"^penstock_requests_placed_total\{(.*?)\} (\S+)", text, re.MULTILINE):
            how = dict(re.findall(r'(\w+)="(.*?)"', labels))["how"]
            counts[how] = counts.get(how, 0) + int(float(value))
        return counts


def work(rate: float, duration: float, seed: int, vocabulary: int) -> list[Request]:
    """Two independent streams of arrivals, merged."""
    chat = Poisson(rate * (1 - LONG_SHARE), duration, *CHAT, SPREAD).work(seed, vocabulary)
    long = Poisson(rate * LONG_SHARE, duration, *LONG, SPREAD).work(seed + 1_000_000, vocabulary)
    return sorted([*chat, *long], key=lambda request: request.at)


@contextlib.contextmanager
def cluster(name: str, model: str, options: Sequence[str], chunk: int | None = None) -> Iterator[Cluster]:
    """`penstock up` with these options."""
    if chunk is not None:
        os.environ["PENSTOCK_EXECUTOR_PREFILL_CHUNK"] = str(chunk)
    try:
        served: Suite
        with suite(model, *options) as served:
            os.environ.pop("PENSTOCK_EXECUTOR_PREFILL_CHUNK", None)
            target = GrpcTarget(served.grpc, model=None, prefix_cache=False, timeout=600)
            try:
                warm(target)
                yield Cluster(name, target, served.http)
            finally:
                target.close()
    finally:
        os.environ.pop("PENSTOCK_EXECUTOR_PREFILL_CHUNK", None)


def best_chunk(arguments: argparse.Namespace, common: Sequence[str], slo: Slo) -> tuple[int, dict[str, float]]:
    """The chunk with the most goodput at the middle rate, and what each gave."""
    rate = sorted(arguments.rate)[len(arguments.rate) // 2]
    found = {}
    for chunk in arguments.chunk:
        with cluster(f"together, {chunk}", arguments.model, common, chunk) as tried:
            load = work(rate, arguments.duration, 77, tried.target.description.vocabulary)
            tried.load(load, rate, arguments.duration, slo)
            found[chunk] = tried.goodput(rate)
    return max(found, key=lambda chunk: found[chunk]), {str(chunk): round(good, 3) for chunk, good in found.items()}


def compare(clusters: Sequence[Cluster], arguments: argparse.Namespace, slo: Slo) -> dict[str, object]:
    random.seed(0)
    for rate in arguments.rate:
        for seed in range(arguments.rounds):
            load = work(rate, arguments.duration, seed, clusters[0].target.description.vocabulary)
            for one in random.sample(clusters, len(clusters)):
                one.load(load, rate, arguments.duration, slo)
    points = {}
    for rate in arguments.rate:
        together, apart, auto = (one.goodput(rate) for one in clusters)
        points[str(rate)] = {
            **{one.name: {"good_per_second": spread(one.good_per_second[rate]), **_times(one, rate)} for one in clusters},
            "auto_to_the_better": round(auto / max(together, apart), 3) if max(together, apart) else None,
        }
    return points


def _times(one: Cluster, rate: float) -> dict[str, object]:
    told = latencies(one.timelines[rate])
    return {"ttft_ms": told["ttft_ms"], "itl_ms": told["itl_ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="requests a second")
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, nargs="+", default=list(CHUNKS), help="prefill chunks to tune `together` over")
    parser.add_argument("--ttft-slo-ms", type=float, default=2000)
    parser.add_argument("--itl-slo-ms", type=float, default=100)
    arguments = parser.parse_args()
    slo = Slo(arguments.ttft_slo_ms / 1000, arguments.itl_slo_ms / 1000)
    common = ("--dtype", arguments.dtype, "--kv-cache-gib", "1")
    cores = len(os.sched_getaffinity(0))
    pools = (*common, "--prefill", "1", "--decode", "1", "--threads", str(2 * cores))
    chunk, tuning = best_chunk(arguments, common, slo)
    with (
        cluster("together", arguments.model, common, chunk) as together,
        cluster("apart", arguments.model, (*pools, "--placement", "apart")) as apart,
        cluster("auto", arguments.model, (*pools, "--placement", "auto")) as auto,
    ):
        points = compare((together, apart, auto), arguments, slo)
        placed = {one.name: one.placed() for one in (together, apart, auto)}
    report(
        "goodput",
        {
            "model": arguments.model,
            "dtype": arguments.dtype,
            "slo_ms": {"ttft": arguments.ttft_slo_ms, "itl": arguments.itl_slo_ms},
            "duration_s": arguments.duration,
            "rounds": arguments.rounds,
            "chunk_of_together": chunk,
            "goodput_by_chunk": tuning,
            "placed": placed,
            "rates": points,
        },
    )


if __name__ == "__main__":
    main()
