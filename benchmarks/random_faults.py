"""Faults at random under a load of streams, with prefill and decode apart: what became of every request, proven by the event log.

    python benchmarks/random_faults.py [--faults 300] [--streams 16] [--seed 1]

Streams are greedy and ask again as soon as they are answered. Meanwhile, at points of the handoff that are drawn at random,
messages are lost, doubled, late, corrupted, stale or cut off, and a process of the suite (an executor of either pool, the gateway,
the scheduler) is killed or stopped for a while; the next round of faults comes when the suite is whole again. Exits with 1 if an
answer differs from an undisturbed one, a token is lost or doubled, a request that was hit is undecided for longer than two leases,
or anything is held in the end: blocks, leases, sequences, decodings, shared memory, and more descriptors or tasks than a process
held that was idle again after the same load, before the first fault. One that was started since has no such number: its measure is
the most that a process of its service and role held then.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from history import Answer, Fault, by_request, check, reactions, sums
from pools import Clients, Fails, Held, Pools
from suite import wait_for

from measuring import report
from penstock.common.faults import Action

OF_MESSAGES = (Action.LOSE, Action.DOUBLE, Action.LATE, Action.CORRUPT, Action.STALE, Action.CUT)
MESSAGES = ("reserve", "push", "commit", "release", "reserved", "pushed", "ack", "renew")
PLACES = (
    *("executor.receive", "executor.send", "executor.reserved", "executor.drawn", "handoff.push.sent", "handoff.push.received"),
    *("handoff.commit.sent", "handoff.commit.received", "handoff.ack.sent", "handoff.ack.received", "handoff.reserve.received"),
    *("gateway.accepted", "gateway.reserved", "gateway.token", "gateway.arrived", "gateway.handed_off"),
    *("scheduler.asked", "scheduler.granted", "scheduler.prefilled"),
)
LEASE = 3.0  # the default of handoffs
POOLS = {"prefill": 1, "decode": 2}
# Some blocks each, and few enough that nobody waits for his turn as long as for a lease.
PROMPTS = [f"Count from {n}: " + " ".join(str(i) for i in range(n, n + 30)) for n in (101, 163, 230, 307, 388, 451, 520, 612)]


class Load:
    """Streams that ask until they are told to stop."""

    def __init__(self, pools: Pools, clients: Clients, streams: int) -> None:
        self._pools = pools
        self.answers: list[Answer] = []
        self._clients = clients
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(streams)]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        while not self._end.is_set():
            answer = self._clients.ask(number % len(PROMPTS))
            self.answers.append(answer)
            if answer.error is not None:
                wait_for(self._pools.gauges)  # the gateway may have to be started again

    def stop(self) -> list[Answer]:
        """All answers, once the last has come."""
        self._end.set()
        for thread in self._threads:
            thread.join(timeout=120)
        hanging = sum(thread.is_alive() for thread in self._threads)
        return self.answers + [Answer("", (), "", error="hangs", finish=None)] * hanging


def of_message(rng: random.Random) -> Fails:
    """A fault of a message."""
    point = f"handoff.{rng.choice(MESSAGES)}.{rng.choice(('sent', 'received'))}"
    return Fails(point, rng.choice(OF_MESSAGES), rng.randint(1, 4), rng.uniform(0, 2))


def of_process(rng: random.Random) -> Fails:
    """A fault of a process."""
    return Fails(rng.choice(PLACES), rng.choice((Action.KILL, Action.KILL, Action.STOP)), rng.randint(1, 3))


def disturb(pools: Pools, count: int, rng: random.Random, rounds: int, until: float) -> list[tuple[Fails, Fault]]:
    """Have so many faults take place: in each of the rounds one of a process, and some of messages close to it."""
    done: list[tuple[Fails, Fault]] = []
    while len(done) < count and time.monotonic() < until:
        if not wait_for(lambda: pools.whole(**POOLS), 120):
            raise RuntimeError("\n".join(["the suite does not become whole again", *pools.log[-20:]]))
        batch = [of_message(rng) for _ in range(min(count // rounds, count - len(done)) - 1)] + [of_process(rng)]
        rules = pools.arm(*batch)
        # Renewals are rare: some will not come; and nothing may, once a process stands still.
        wait_for(lambda rules=rules: pools.stopped() or sum(pools.fired(rule) is not None for rule in rules) > len(rules) * 0.8, 8)
        pools.disarm()
        done += [(fails, fault) for fails, rule in zip(batch, rules, strict=True) if (fault := pools.fired(rule))]
        if pools.stopped():
            time.sleep(rng.uniform(0.2, 1.5 if batch[-1].point.startswith(("gateway", "scheduler")) else 2 * LEASE))
            pools.let_go_on()
        print(f"{len(done)} of {count}", file=sys.stderr)
    return done


def warmed(pools: Pools, clients: Clients, streams: int) -> dict[Held, int]:
    """What idle processes hold that have had the load."""
    for _ in range(3):
        clients.ask_all(streams)
    pools.assert_idle(60)
    return pools.held()


def left_behind(pools: Pools, before: Mapping[Held, int]) -> tuple[dict[str, object], list[str]]:
    """What each process holds once nothing is in work, and what of it is too much."""
    wait_for(lambda: pools.whole(**POOLS), 120)
    wrong = [] if wait_for(lambda: not any(pools.counts().values()), 60) else [f"held: {pools.counts()}"]
    wait_for(lambda: not pools.held_beyond(before), 60)
    beyond, now = pools.held_beyond(before), pools.held()
    wrong += [f"held: {key.what} of {key.kind} {key.pid}: {count}, and {most} before" for key, (most, count) in beyond.items()]
    segments = [path.name for path in Path("/dev/shm").glob("penstock-*")]  # noqa: S108 - where handoffs have theirs
    wrong += [f"left behind: {name}" for name in segments]
    pids, old = ({key.pid for key in held} for held in (now, before))
    told: dict[str, object] = {"processes_that_lived_through": len(pids & old), "processes_started_since": len(pids - old)}
    for what in ("descriptors", "tasks", "segments"):
        told[what] = {
            "before": sum(n for key, n in before.items() if key.what == what),
            "after": sum(n for key, n in now.items() if key.what == what),
            "processes_with_more": sum(key.what == what for key in beyond),
        }
    return {**told, "segments_with_a_name": len(segments)}, wrong


def run(arguments: argparse.Namespace, folder: Path) -> tuple[dict[str, object], list[str]]:
    """The figures, and what is wrong."""
    with Pools(folder, **POOLS, lease=LEASE) as pools:
        clients = Clients(pools.grpc, PROMPTS, arguments.tokens)
        before = warmed(pools, clients, arguments.streams)
        load = Load(pools, clients, arguments.streams)
        began = time.monotonic()
        try:
            faults = disturb(
                pools, arguments.faults, random.Random(arguments.seed), arguments.rounds, began + 60 * arguments.minutes
            )
        finally:
            answers = load.stop()
        seconds = time.monotonic() - began
        held, wrong = left_behind(pools, before)
        events = pools.events()
    happened = [fault for _, fault in faults]
    wrong += check(events, answers, happened, 2 * LEASE)
    hit = [after for history in by_request(events).values() for fault in happened for _, after in reactions(history, fault)]
    decided = [after for after in hit if after < math.inf]  # a gateway that died decides no more
    told = sums(events)
    figures = {
        "faults": dict(
            Counter(f"{'process' if f.action in {Action.KILL, Action.STOP} else 'message'} {f.action.value}" for f, _ in faults)
        ),
        "streams": arguments.streams,
        "seconds": round(seconds),
        "answered_as_undisturbed": sum(a.error is None and a.text == a.expected_text for a in answers),
        "answered_otherwise": sum(a.error is None and a.text != a.expected_text for a in answers),
        "failed": dict(Counter(a.error for a in answers if a.error is not None)),
        "tokens_lost_or_doubled": sum(list(a.ids) != list(a.expected_ids[: len(a.ids)]) for a in answers),
        "handoffs": told.arrivals,
        "fallbacks": {f"{fallback}, {reason}": count for (fallback, reason), count in sorted(told.fallbacks.items())},
        "two_leases_s": 2 * LEASE,
        "requests_hit": len(hit),
        "longest_until_decided_s": round(max(decided), 2),
        "held_in_the_end": held,
        "wrong": len(wrong),
    }
    return figures, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=15, help="the faults are spread over so many; each has one of a process")
    parser.add_argument("--minutes", type=float, default=60, help="no round is begun after so long")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures, wrong = run(arguments, Path(folder))
    report("random_faults", figures)
    if wrong:
        raise SystemExit("\n".join(wrong[:20]))


if __name__ == "__main__":
    main()
