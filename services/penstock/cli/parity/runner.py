"""Runs the checks on two clusters."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from penstock.cli.parity.checks import CHECKS
from penstock.cli.parity.compare import Measure
from penstock.cli.parity.kit import Kit, Unanswered
from penstock.client import Client, InvalidRequest, Model, UnknownModel

__all__ = ["Outcome", "Report", "model_of", "run"]


class Outcome(StrEnum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Report:
    """What came of one check.

    Attributes:
        requests: that were asked of each of the two clusters.
        tokens: output tokens that were compared.
        alike: those that are the same, in each answer up to its first other one.
        apart: requests of which KV was handed over.
        native: those of them whose KV went over as the cache holds it, without conversion.
        kv_bytes: of that KV, by transport.
        logprobs: pairs of log-probabilities that were compared.
        logprob_difference: the largest between two of them.
        logprob_difference_mean: between two of them.
        why: the first fault and how many there are, or why it was skipped.
    """

    check: str
    outcome: Outcome
    requests: int = 0
    tokens: int = 0
    alike: int = 0
    apart: int = 0
    native: int = 0
    kv_bytes: dict[str, int] | None = None
    logprobs: int = 0
    logprob_difference: float = 0.0
    logprob_difference_mean: float = 0.0
    seconds: float = 0.0
    why: str = ""


def model_of(client: Client, name: str | None) -> Model:
    """The model of this name, or the only one.

    Raises:
        UnknownModel: there is none, or there are several to choose from.
        PenstockError: the cluster does not say.
    """
    models = client.models()
    found = [model for model in models if name in {None, model.name}]
    if len(found) != 1:
        raise UnknownModel(f"--model: must be one of {', '.join(model.name for model in models)}")
    return found[0]


def run(
    together: Client, apart: Client, *, model: str | None, tolerance: float, rounded: bool = False, checks: Collection[str]
) -> Iterator[Report]:
    """The report of each check, as it ends: first of what both serve, then of those that are named, or of all.

    Raises:
        PenstockError: a cluster does not answer, or serves no such model.
    """
    ours, theirs = model_of(together, model), model_of(apart, model)
    yield _models(ours, theirs)
    executors = (*ours.executors, *theirs.executors)
    # Blocks are of other sizes on another backend, and some share no prefixes.
    alike = len({(e.backend, e.dtype, e.kv_layout, "prefix_cache" in e.features) for e in executors}) == 1
    for name, check in CHECKS.items():
        if not checks or name in checks:
            measure = Measure(tolerance, cached_tokens=alike, rounded=rounded)
            yield _checked(name, check, Kit(together, apart, ours, measure, seed=name))


def _models(ours: Model, theirs: Model) -> Report:
    facts = [(m.name, m.fingerprint, m.context_length, m.vocabulary_size) for m in (ours, theirs)]
    same = facts[0][1:] == facts[1][1:]
    why = "" if same else f"{facts[0]} and {facts[1]}: name, fingerprint, context and vocabulary"
    return Report("model", Outcome.PASSED if same else Outcome.FAILED, why=why)


def _checked(name: str, check: Callable[[Kit], None], kit: Kit) -> Report:
    began = time.monotonic()
    outcome, why = Outcome.PASSED, ""
    try:
        check(kit)
    except InvalidRequest as error:
        outcome, why = Outcome.SKIPPED, str(error)
    except Unanswered as error:
        kit.faults.append(str(error))
    if kit.undecided:
        outcome, why = Outcome.SKIPPED, f"together answers otherwise too in other company; {_first(kit.undecided)}"
    if kit.faults:
        outcome, why = Outcome.FAILED, _first(kit.faults)
    return Report(
        name,
        outcome,
        requests=kit.asked,
        tokens=kit.tokens,
        alike=kit.measure.alike,
        apart=kit.apart_count,
        native=kit.native_count,
        kv_bytes=kit.kv_bytes,
        logprobs=kit.measure.logprobs,
        logprob_difference=kit.measure.largest,
        logprob_difference_mean=kit.measure.total / max(1, kit.measure.logprobs),
        seconds=time.monotonic() - began,
        why=why,
    )


def _first(found: Sequence[str]) -> str:
    return f"{found[0]} (and {len(found) - 1} more)" if len(found) > 1 else found[0]
