"""Parity of prefill and decode apart across backends: every pair of them, held against the one that decodes.

    python benchmarks/parity_across.py [--model builtin] [--dtype f32] [--tolerance 1e-4] [--decode BACKEND ...]

Starts a cluster of one executor for each backend, and for each pair one that prefills on the first and decodes on the second, with
a thread for each executor, and runs `penstock parity` on the two. Exits with 1 if a check failed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections import Counter
from typing import Any

from measuring import report, suite

BACKENDS = ("openvino", "torch", "onnxruntime")


def parity(together: str, apart: str, tolerance: float) -> dict[str, Any]:
    """What the kit finds, all checks together."""
    command = [sys.executable, "-m", "penstock.cli", "parity", "--together", together, "--apart", apart, "--json"]
    done = subprocess.run([*command, "--tolerance", str(tolerance)], check=False, stdout=subprocess.PIPE, text=True)
    checks = json.loads(done.stdout)
    moved: Counter[str] = Counter()
    for check in checks:
        moved.update(check["kv_bytes"] or {})
    return {
        "checks": dict(Counter(check["outcome"] for check in checks)),
        "requests": sum(check["requests"] for check in checks),
        "ran_apart": sum(check["apart"] for check in checks),
        "tokens": sum(check["tokens"] for check in checks),
        "largest_logprob_difference": max(check["logprob_difference"] for check in checks),
        "kv_bytes": dict(moved),
        "failed": {check["check"]: check["why"] for check in checks if check["outcome"] == "failed"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--dtype", default="f32")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--decode", nargs="+", choices=BACKENDS, default=BACKENDS)
    arguments = parser.parse_args()
    common = ("--dtype", arguments.dtype, "--log-level", "warning")
    apart_options = ("--prefill", "1", "--decode", "1", "--placement", "apart", "--threads", "2")
    found: dict[str, dict[str, Any]] = {}
    for decode in arguments.decode:
        with suite(arguments.model, "--backend", decode, "--threads", "1", *common) as together:
            for prefill in BACKENDS:
                pools = ("--prefill-backend", prefill, "--decode-backend", decode)
                with suite(arguments.model, *pools, *apart_options, *common) as apart:
                    tolerance = 0.0 if prefill == decode else arguments.tolerance
                    found[f"{prefill} to {decode}"] = parity(together.grpc, apart.grpc, tolerance)
    report("parity_across", {"model": arguments.model, "dtype": arguments.dtype, "pairs": found})
    faults = list(itertools.chain.from_iterable(pair["failed"].values() for pair in found.values()))
    if faults:
        raise SystemExit("\n".join(faults))


if __name__ == "__main__":
    main()
