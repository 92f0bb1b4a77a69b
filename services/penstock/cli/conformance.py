"""`penstock conformance`: whether a backend does what the contract asks, check by check."""

from __future__ import annotations

import faulthandler
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from penstock.cli.tables import print_table

__all__ = ["conformance"]


def conformance(
    backend: str,
    *,
    model: str | None = None,
    dtype: Literal["f32", "bf16", "int8", "int4"] | None = None,
    kv_cache_dtype: Literal["int8"] | None = None,
    against: str | None = None,
    check: Annotated[list[str] | None, Parameter(negative=())] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Hold a backend against the suite that every backend has to pass; exit with 1 where it falls short.

    Args:
        backend: Name of the backend, built in or from another package.
        model: Folder of a checkpoint, builtin, or a Hugging Face id; a small random one of each family where absent.
        dtype: How weights are held and computed; f32 where absent and the backend has it.
        kv_cache_dtype: Type of the KV cache; the backend's own choice where absent.
        against: Another backend, to compare answers with and to exchange KV with, both ways.
        check: Name of a check to run, more than once for several; all where absent.
        as_json: One JSON list instead of a table.
    """
    from penstock.backends.conformance import Outcome, run
    from penstock.backends.contract import DType

    faulthandler.enable(2)  # a backend that crashes the process is told with where it did
    results = run(
        backend,
        model=model,
        dtype=None if dtype is None else DType(dtype),
        kv_dtype=None if kv_cache_dtype is None else DType(kv_cache_dtype),
        against=against,
        checks=tuple(check or ()),
    )
    done = list(_with_progress(results) if sys.stderr.isatty() else results)
    if as_json:
        print(json.dumps([asdict(result) for result in done], indent=2))
    else:
        _print(done)
    return 1 if any(result.outcome is Outcome.FAILED for result in done) else 0


def _with_progress(results: Iterable[Any]) -> Iterator[Any]:
    for result in results:
        print(f"\r\x1b[K{result.model}: {result.check} {result.outcome}", end="", file=sys.stderr, flush=True)
        yield result
    print("\r\x1b[K", end="", file=sys.stderr)


def _print(results: list[Any]) -> None:
    """A table, and how many checks there were of each outcome."""
    print_table(
        ("model", "type, KV's", "check", "outcome", "seconds", "why"),
        ((r.model, _types(r), r.check, r.outcome, f"{r.seconds:.2f}", r.reason) for r in results),
    )
    counts = Counter(result.outcome for result in results)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))


def _types(result: Any) -> str:
    return result.dtype if result.kv_dtype is None else f"{result.dtype}, {result.kv_dtype}"
