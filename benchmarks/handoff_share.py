"""What handing KV over adds to a request: a prompt of 2,000 tokens, prefilled on one executor and decoded on another.

    python benchmarks/handoff_share.py MODEL [--kv-cache-dtype auto int8] [--rounds 3] [any option of penstock up]

Exposed is the transfer's part behind the end of prefill, as the answer's closing tells it; the rest of it went while prefill still
ran. The first token is told by the prefill side and waits for no transfer: what is exposed delays the second one. Its share of
the time to the first token is told nevertheless, since that is the wait that a user has to bear anyway.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from measuring import report, spread, suite
from penstock.client import Client

PROMPT = 2000


def one(client: Client, seed: int, tokens: int = PROMPT) -> dict[str, float | str | bool]:
    """Figures of one request whose prompt is no other's."""
    drawn = random.Random(seed)
    prompt = [drawn.randrange(100, 700) for _ in range(tokens)]
    began, first = time.perf_counter(), 0.0
    with client.generate(prompt, max_tokens=4, ignore_eos=True) as stream:
        for _ in stream:
            first = first or time.perf_counter() - began
        closing = stream.closing
    if closing is None or closing.handoff is None:
        raise SystemExit(f"nothing was handed over: {closing}")
    handed = closing.handoff
    return {
        "ttft_s": first,
        "transfer_s": handed.transfer_seconds,
        "exposed_s": handed.exposed_seconds,
        "share": handed.exposed_seconds / first,
        "mib": handed.kv_bytes / (1 << 20),
        "transport": handed.transport,
        "native": handed.native,
    }


def measure(model: str, kv_cache_dtype: str, rounds: int, options: list[str]) -> dict[str, object]:
    """One suite."""
    pools = ["--prefill", "1", "--decode", "1", "--placement", "apart", "--kv-cache-dtype", kv_cache_dtype]
    with suite(model, *pools, *options) as running, Client(running.grpc) as client:
        one(client, 0, 100)  # the two connect
        found = []
        for seed in range(1, rounds + 1):
            found.append(one(client, seed))
            print(found[-1], file=sys.stderr, flush=True)
    figures: dict[str, object] = {
        key: spread([float(each[key]) for each in found]) for key in ("ttft_s", "transfer_s", "exposed_s", "share")
    }
    return figures | {key: found[-1][key] for key in ("mib", "transport", "native")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kv-cache-dtype", nargs="*", default=["auto", "int8"])
    parser.add_argument("--rounds", type=int, default=3)
    asked, options = parser.parse_known_args()
    report(
        "handoff_share",
        {dtype: measure(asked.model, dtype, asked.rounds, options) for dtype in asked.kv_cache_dtype},
    )


if __name__ == "__main__":
    main()
