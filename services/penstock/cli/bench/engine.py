"""`penstock bench engine`: the engine alone, in this process."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.options import WHOLE, Work
from penstock.cli.bench.session import measure

__all__ = ["engine"]

_DEFAULTS = EngineOptions()


def engine(
    model: str,
    *,
    options: Annotated[EngineOptions, Parameter(name="*")] = _DEFAULTS,
    work: Annotated[Work, Parameter(name="*")] = WHOLE,
) -> int:
    """Measure the engine alone: no service, no wire, no tokenizer.

    Prompts are random token ids; answers are greedy and have an exact length.

    Args:
        model: A folder, a Hugging Face hub id, or builtin.
        options: See its fields.
        work: See its fields.
    """
    return measure(work, lambda: EngineTarget(model, options))
