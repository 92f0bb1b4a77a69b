"""Pools that change under load: decode executors from 1 to 3 and back, and roles flipped, while 16 streams are answered.

    python benchmarks/scaling.py [--rounds 5] [--streams 16]

Streams are greedy and ask again as soon as they are answered; their prompts are cached for nobody, so that placement `apart` hands
KV over for each. Exits with 1 if an answer failed or differs from an undisturbed one, or if anything is held in the end.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter

from asking import Asking
from measuring import report, suite
from penstock.client import Client

GAUGES = ("calls", "placings", "sequences", "decodings")


class Stream(Asking):
    """Asks for what nobody has cached."""

    def ask(self) -> str:
        salt = f"{self.prompt} {self.outcomes['asked']}"
        self.outcomes["asked"] += 1
        options = {"max_tokens": self.tokens, "temperature": 0.0, "ignore_eos": True, "cache_salt": salt}
        result = self.client.generate(self.prompt, **options).result()
        closing = result.closing
        self.outcomes["handed over"] += closing.handoff is not None
        self.outcomes[f"fallback {closing.fallback}"] += 1
        self.outcomes["replacements"] += closing.replacements
        return result.text


def penstock(*arguments: str) -> float:
    """Run a command; seconds that it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "penstock.cli", *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def held(http: str) -> dict[str, float]:
    """What the gateway holds on behalf of requests."""
    with urllib.request.urlopen(f"http://{http}/metrics", timeout=10) as answer:
        lines = [line.split() for line in answer.read().decode().splitlines() if line[0] != "#"]
    told = {name: float(value) for name, value in lines if name.removeprefix("penstock_gateway_") in GAUGES}
    return {name: value for name, value in told.items() if value}


def change(rounds: int, target: str) -> dict[str, list[float]]:
    """Seconds of each kind of change."""
    took: dict[str, list[float]] = {"decode 1 to 3": [], "role flips": [], "decode 3 to 1": []}
    for _ in range(rounds):
        took["decode 1 to 3"].append(penstock("scale", "--decode", "3", "--prefill", "1", "--target", target))
        processes = json.loads(
            subprocess.run(
                [sys.executable, "-m", "penstock.cli", "scale", "--json", "--target", target], check=True, capture_output=True
            ).stdout
        )
        decoding = [told["process"] for told in processes if told["role"] == "decode"]
        for role in ("prefill", "both", "decode"):
            took["role flips"].append(penstock("role", decoding[0], role, "--target", target))
        took["decode 3 to 1"].append(penstock("scale", "--decode", "1", "--target", target))
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    options = ("--dtype", "f32", "--prefill", "1", "--decode", "1", "--placement", "apart", "--threads", "2")
    with suite("builtin", *options) as running, Client(running.grpc) as client:
        stop = threading.Event()
        starts = range(10, 10 + 50 * arguments.streams, 50)
        streams = [Stream(client, f"Count from {n}: {n} {n + 1} {n + 2}", arguments.tokens, stop) for n in starts]
        for stream in streams:
            stream.start()
        took = change(arguments.rounds, running.grpc)
        stop.set()
        for stream in streams:
            stream.join()
        left = held(running.http)
    outcomes = sum((stream.outcomes for stream in streams), Counter())
    errors = [error for stream in streams for error in stream.errors]
    seconds = {name: {"times": len(all_of), "longest_s": round(max(all_of), 2)} for name, all_of in took.items()}
    report("scaling", {**outcomes, "failed": len(errors), "held": left, "changes": seconds})
    if outcomes["wrong"] or errors or left:
        raise SystemExit("\n".join(["answers differ or failed, or something is held", *errors[:5]]))


if __name__ == "__main__":
    main()
