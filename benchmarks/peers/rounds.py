"""Rounds of a comparison: each of the two in turn on the same work, while the other one waits."""

from __future__ import annotations

from dataclasses import replace

import psutil

from peers.bandwidth import Probe
from peers.contestants import Contestant
from peers.results import Comparison

__all__ = ["compare"]

_WARM_UP_TOKENS = 4


def compare(
    into: Comparison, peer: Contestant, ours: Contestant, rounds: int, vocabulary: int, probe: Probe | None, bytes_read: int
) -> None:
    """Run so many rounds on both, after a little of the same shape that counts for nothing; with a `probe`, the share too."""
    first = [
        replace(request, new_tokens=min(_WARM_UP_TOKENS, request.new_tokens)) for request in into.scenario.work(rounds, vocabulary)
    ]
    for contestant in (peer, ours):
        contestant.run(first)
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
