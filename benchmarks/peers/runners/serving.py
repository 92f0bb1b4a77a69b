"""What every runner shares: a process that loads one model, then does work as it is told to, line by line.

A runner is started as ``PYTHON run_NAME.py MODEL PRECISION CONVERTED``. MODEL is a folder in Hugging Face's format; CONVERTED is
a folder that belongs to this peer, for what it has to make of MODEL first. Once loaded it tells what it is in a line of JSON. Each
line that it reads, ``{"prompts": [[id, …], …], "new_tokens": n}``, is answered by one: the seconds that it took, or what was wrong.
The end of its input ends it. Only the standard library is used here, since each peer has its own environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Arguments", "Loaded", "Run", "arguments", "cores", "serve", "told"]

# Continues each prompt greedily by exactly so many tokens, whatever they are; returns how many each got.
Run = Callable[[Sequence[Sequence[int]], int], Sequence[int]]


@dataclass(frozen=True)
class Arguments:
    """What a runner was started with."""

    model: Path
    precision: str
    converted: Path


@dataclass(frozen=True)
class Loaded:
    """An engine with its model: its version, what it says of how it runs, and the work that it does."""

    version: str
    run: Run
    details: str = ""


def arguments() -> Arguments:
    """The command line."""
    model, precision, converted = sys.argv[1:]
    return Arguments(Path(model), precision, Path(converted))


def cores() -> int:
    """Cores that this process may use: one thread on each."""
    return len(os.sched_getaffinity(0))


def told(text: str) -> None:
    """A line for the log."""
    print(text, file=sys.stderr, flush=True)


def serve(load: Callable[[Arguments], Loaded]) -> None:
    """Load, then work until the input ends. What libraries print goes to standard error: standard output is for answers."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    def fail(error: Exception) -> NoReturn:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1)

    try:
        began = time.perf_counter()
        loaded = load(arguments())
        loaded.run([list(range(100, 132))], 4)  # what a first run sets up is not timed
        answer({"version": loaded.version, "details": loaded.details, "load_seconds": time.perf_counter() - began})
        for line in sys.stdin:
            answer(_timed(loaded.run, json.loads(line)))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises, its name and text are the answer
        fail(error)


def _timed(run: Run, work: dict[str, Any]) -> dict[str, float]:
    began = time.perf_counter()
    counts = run(work["prompts"], work["new_tokens"])
    taken = {"seconds": time.perf_counter() - began}
    expected = [work["new_tokens"]] * len(work["prompts"])
    if list(counts) != expected:
        raise RuntimeError(f"new tokens of each request: {list(counts)}, where {work['new_tokens']} were asked for")
    return taken
