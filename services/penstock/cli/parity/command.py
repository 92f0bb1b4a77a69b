"""`penstock parity`: two clusters held against each other."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.connection import Connection, connected
from penstock.cli.parity.checks import CHECKS
from penstock.cli.parity.runner import Outcome, Report, model_of, run
from penstock.cli.tables import print_table
from penstock.common.config import ConfigError

__all__ = ["parity"]


def parity(
    *,
    together: str,
    apart: str,
    model: str | None = None,
    tolerance: float = 0.0,
    rounded: Annotated[bool, Parameter(negative=())] = False,
    check: Annotated[list[str] | None, Parameter(negative=())] = None,
    api_key: str | None = None,
    timeout: float = 120.0,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Hold a cluster that runs prefill and decoding apart against one that runs them together; exit with 0 if they are the same.

    Tokens, texts, finish reasons and usage have to be the same, log-probabilities within the tolerance, and the closings have to
    prove where each request ran. Cached tokens are compared where all executors are of one backend and dtype. Have both clusters
    idle: what else they do changes how steps are cut, and on most backends the last bits of logits with it. A check is skipped
    where requests beside others differ, and the first cluster by itself answers them otherwise in other company.

    Args:
        together: HOST:PORT of the gRPC door of the cluster that runs them together; grpcs://HOST:PORT where TLS stands before it.
        apart: HOST:PORT of the gRPC door of the other; it should run with --placement apart.
        model: Name of the model; the only one where absent.
        tolerance: By how much log-probabilities may differ. Executors of other backends, threads or chunks differ in the last bits.
        rounded: Let tokens differ, as they may where one side rounds weights or KV otherwise: up to an answer's first other token
            log-probabilities have to be within the tolerance, and what stands behind it is not compared.
        check: Name of a check to run, more than once for several; all where absent.
        api_key: Key that both clusters know the caller by, where they want one.
        timeout: Seconds that one request may take.
        as_json: One JSON list instead of a table.
    """
    _refuse(tolerance, check or [])
    one, other = (Connection(target=target, api_key=api_key, timeout=timeout) for target in (together, apart))
    for connection in (one, other):
        with connected(connection) as cluster:  # each by itself, so that the one that is away is the one that is named
            model_of(cluster, model)
    with connected(one) as ours, connected(other) as theirs:
        reports = run(ours, theirs, model=model, tolerance=tolerance, rounded=rounded, checks=check or ())
        done = list(_with_progress(reports) if sys.stderr.isatty() else reports)
    if as_json:
        print(json.dumps([asdict(report) for report in done], indent=2))
    else:
        _print(done)
    doubt = _doubt(done)
    if doubt:
        print(doubt, file=sys.stderr)
    return 1 if doubt else 0


def _doubt(reports: Sequence[Report]) -> str:
    """Why the two clusters are not known to be the same; empty where they are."""
    failed = sum(report.outcome is Outcome.FAILED for report in reports)
    if failed:
        return f"{failed} of {len(reports)} checks failed"
    if not any(report.outcome is Outcome.PASSED and report.requests for report in reports):
        return "nothing is proven: both clusters refused every request"
    if not any(report.apart for report in reports):
        return "nothing is proven: no KV was handed over in any of these checks"
    return ""


def _refuse(tolerance: float, checks: list[str]) -> None:
    if not 0 <= tolerance < math.inf:
        raise ConfigError(f"--tolerance: must be 0 or more, and is {tolerance}")
    for name in checks:
        if name not in CHECKS:
            raise ConfigError(f"--check: must be one of {', '.join(CHECKS)}, and is {name!r}")


def _with_progress(reports: Iterable[Report]) -> Iterator[Report]:
    for report in reports:
        print(f"\r\x1b[K{report.check} {report.outcome}", end="", file=sys.stderr, flush=True)
        yield report
    print("\r\x1b[K", end="", file=sys.stderr)


def _print(reports: list[Report]) -> None:
    """A table, how many checks there were of each outcome, and what was handed over."""
    headings = ("check", "outcome", "requests", "ran apart", "tokens", "seconds", "why")
    rows = ((r.check, r.outcome, r.requests, r.apart, r.tokens, f"{r.seconds:.2f}", r.why) for r in reports)
    print_table(headings, rows)
    counts = Counter(report.outcome for report in reports)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    handed: Counter[str] = Counter()
    for report in reports:
        handed.update(report.kv_bytes or {})
    sizes = ", ".join(f"{size / 2**20:.2f} MiB by {transport}" for transport, size in handed.items()) or "none"
    print(f"KV handed over: {sizes}; without conversion: {sum(r.native for r in reports)} of {sum(r.apart for r in reports)} times")
    alike = f"{sum(r.alike for r in reports)} of {sum(r.tokens for r in reports)}"
    largest = max(r.logprob_difference for r in reports)
    print(f"tokens alike, up to each answer's first other one: {alike}; largest difference of log-probabilities: {largest:.3g}")
