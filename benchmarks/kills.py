"""Services killed at random points of a load: 50 kills, 8 streams, and every answer must be what it would have been.

    python benchmarks/kills.py [--kills 50] [--streams 8]

Streams are greedy and ask again as soon as they are answered. Meanwhile an executor, the tokenizer or the scheduler, drawn at
random, is killed with SIGKILL at a random moment; the next one is killed once the suite is whole again. Exits with 1 if an answer
failed or differs from an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import threading
import time
from collections import Counter

import psutil

from asking import Asking
from measuring import report, suite
from penstock.client import Client

VICTIMS = ("executor", "executor", "executor", "tokenizer", "scheduler")


class Stream(Asking):
    """Knows the longest time that it has waited for a text."""

    longest_pause = 0.0

    def ask(self) -> str:
        text, last = "", time.perf_counter()
        with self.client.generate(self.prompt, max_tokens=self.tokens, temperature=0.0, ignore_eos=True) as stream:
            for event in stream:
                text += event.text
                now = time.perf_counter()
                self.longest_pause, last = max(self.longest_pause, now - last), now
        self.outcomes["replacements"] += stream.closing.replacements if stream.closing else 0
        return text


def living_processes(service: str) -> list[psutil.Process]:
    """The suite's processes of a service."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # gone, or a zombie, between the two looks
            if f"penstock.cli {service} " in " ".join(process.cmdline()):
                found.append(process)
    return found


def kill_at_random(kills: int, rng: random.Random, executors: int, client: Client) -> Counter[str]:
    """Kill so many services, each when all of them live."""
    killed: Counter[str] = Counter()
    while killed.total() < kills:
        time.sleep(rng.uniform(0.05, 1.0))
        if sum(len(model.executors) for model in client.models()) < executors:
            continue
        name = rng.choice(VICTIMS)
        living = living_processes(name)
        if living:
            rng.choice(living).kill()
            killed[name] += 1
    return killed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    options = ("--dtype", "f32", "--workers", str(arguments.workers), "--healthy-seconds", "0")
    with suite("builtin", *options) as running, Client(running.grpc) as client:
        stop = threading.Event()
        starts = range(10, 10 + 90 * arguments.streams, 90)
        streams = [Stream(client, f"Count from {n}: {n} {n + 1} {n + 2}", arguments.tokens, stop) for n in starts]
        for stream in streams:
            stream.start()
        killed = kill_at_random(arguments.kills, random.Random(arguments.seed), arguments.workers, client)
        stop.set()
        for stream in streams:
            stream.join()
    outcomes = sum((stream.outcomes for stream in streams), Counter())
    errors = [error for stream in streams for error in stream.errors]
    report(
        "kills",
        {
            "kills": dict(killed),
            "answers": outcomes["right"] + outcomes["wrong"] + len(errors),
            "equal_to_undisturbed": outcomes["right"],
            "different": outcomes["wrong"],
            "failed": len(errors),
            "replacements": outcomes["replacements"],
            "longest_pause_s": round(max(s.longest_pause for s in streams), 2),
        },
    )
    if outcomes["wrong"] or errors:
        raise SystemExit("\n".join(["answers differ or failed", *errors[:5]]))


if __name__ == "__main__":
    main()
