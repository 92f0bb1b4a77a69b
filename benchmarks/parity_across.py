"""Parity of prefill and decode apart across backends and roundings: every pair of them, held against the one that decodes.

    python benchmarks/parity_across.py [--model builtin] [--prefill BACKEND ...] [--decode BACKEND ...] [--tolerance 1e-4]
        [--prefill-dtype f32] [--prefill-kv-cache-dtype auto] [--decode-dtype f32] [--decode-kv-cache-dtype auto]

Starts a cluster of one executor for each backend, and for each pair one that prefills on the first and decodes on the second, with
a thread for each executor, and runs `penstock parity` on the two. Sides that are the same in all have to answer alike to the bit;
where all is float32, every token has to be the same. Where either rounds weights or KV, tokens may differ, and `--tolerance` bounds
log-probabilities up to an answer's first other token; beside it stands how far the two are from each other when each runs together.
Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from measuring import report, suite

BACKENDS = ("openvino", "torch", "onnxruntime")
ROUNDED = ("--rounded", "--check", "logprobs", "--check", "prompt_logprobs")


@dataclass(frozen=True)
class Side:
    """How executors compute."""

    backend: str
    dtype: str
    kv_cache_dtype: str

    @property
    def rounds(self) -> bool:
        return (self.dtype, self.kv_cache_dtype) != ("f32", "auto")

    def flags(self, prefix: str = "") -> list[str]:
        told = {"backend": self.backend, "dtype": self.dtype, "kv-cache-dtype": self.kv_cache_dtype}
        return [word for name, value in told.items() for word in (f"--{prefix}{name}", value)]


def parity(together: str, apart: str, *flags: str) -> list[dict[str, Any]]:
    """What the kit finds, check by check."""
    command = [sys.executable, "-m", "penstock.cli", "parity", "--together", together, "--apart", apart, "--json", *flags]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    checks: list[dict[str, Any]] = json.loads(done.stdout)
    return checks


def logprobs(checks: list[dict[str, Any]]) -> dict[str, float]:
    """How far they are from each other."""
    count = sum(check["logprobs"] for check in checks)
    return {
        "logprobs": count,
        "largest_difference": max(check["logprob_difference"] for check in checks),
        "mean_difference": sum(check["logprob_difference_mean"] * check["logprobs"] for check in checks) / max(1, count),
    }


def figures(checks: list[dict[str, Any]]) -> dict[str, Any]:
    """All checks together."""
    moved: Counter[str] = Counter()
    for check in checks:
        moved.update(check["kv_bytes"] or {})
    sums = {name: sum(check[name] for check in checks) for name in ("requests", "apart", "native", "tokens", "alike")}
    return {
        "checks": dict(Counter(check["outcome"] for check in checks)),
        **sums,
        **logprobs(checks),
        "kv_bytes": dict(moved),
        "failed": {check["check"]: check["why"] for check in checks if check["outcome"] == "failed"},
        "skipped": {check["check"]: check["why"] for check in checks if check["outcome"] == "skipped"},
    }


def pair(model: str, prefill: Side, decode: Side, tolerance: float, together: str) -> dict[str, Any]:
    """One pair, against the cluster of its decoding side."""
    log = ("--log-level", "warning")
    pools = ("--prefill", "1", "--decode", "1", "--placement", "apart", "--threads", "2")
    rounded = prefill.rounds or decode.rounds
    flags = () if prefill == decode else ("--tolerance", str(tolerance), *(["--rounded"] if rounded else ()))
    with suite(model, *prefill.flags("prefill-"), *decode.flags("decode-"), *pools, *log) as apart:
        found = figures(parity(together, apart.grpc, *flags))
    if rounded and prefill != decode:
        with suite(model, *prefill.flags(), "--threads", "1", *log) as other:
            found["the_two_together"] = logprobs(parity(together, other.grpc, *ROUNDED))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    for role in ("prefill", "decode"):
        parser.add_argument(f"--{role}", nargs="+", choices=BACKENDS, default=BACKENDS)
        parser.add_argument(f"--{role}-dtype", default="f32")
        parser.add_argument(f"--{role}-kv-cache-dtype", default="auto")
    arguments = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for backend in arguments.decode:
        decode = Side(backend, arguments.decode_dtype, arguments.decode_kv_cache_dtype)
        with suite(arguments.model, *decode.flags(), "--threads", "1", "--log-level", "warning") as together:
            for other in arguments.prefill:
                prefill = Side(other, arguments.prefill_dtype, arguments.prefill_kv_cache_dtype)
                name = " to ".join(f"{side.backend} {side.dtype}, KV {side.kv_cache_dtype}" for side in (prefill, decode))
                found[name] = pair(arguments.model, prefill, decode, arguments.tolerance, together.grpc)
    report("parity_across", {"model": arguments.model, "tolerance": arguments.tolerance, "pairs": found})
    faults = [f"{name}: {why}" for name, one in found.items() for why in one["failed"].values()]
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
