"""Rounds of a comparison: each of the two in turn on the same work, while the other one waits."""

from __future__ import annotations

import psutil

from peers.bandwidth import Probe
from peers.contestants import Contestant
from peers.results import Comparison
from penstock.cli.bench.scenarios import warm_up

__all__ = ["compare"]


def compare(
    into: Comparison, peer: Contestant, ours: Contestant, rounds: int, vocabulary: int, probe: Probe | None, bytes_read: int
) -> None:
    """Run a scenario so many rounds on both, after one run of each that counts for nothing; `probe` also asks for the share."""
    for contestant in (peer, ours):
        contestant.run(warm_up(vocabulary))
        contestant.run(into.scenario.work(rounds, vocabulary))  # what first runs of a shape set up
    for seed in range(rounds):
        work = into.scenario.work(seed, vocabulary)
        sides = [(peer, ours, into.peer_seconds), (ours, peer, into.our_seconds)]
        for running, waiting, taken in sides if seed % 2 else reversed(sides):
            before = _processor_seconds(waiting)
            seconds = running.run(work)
            taken.append(seconds)
            into.waiting_cores = max(into.waiting_cores, (_processor_seconds(waiting) - before) / seconds)
        if probe is not None:
            into.shares.append(bytes_read / into.our_seconds[-1] / probe.bytes_per_second())


def _processor_seconds(contestant: Contestant) -> float:
    total = 0.0
    for process in contestant.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended since it was listed
            continue
        total += times.user + times.system
    return total
