"""Log-probabilities of tokens, and the bytes of the tokens that they name, which the tokenizer is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from penstock.gateway.choice import ids_of

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request
    from penstock.gateway.ports import TokenReport

__all__ = ["describe_again", "named_in_prompt", "prompt_report", "report"]


def report(request: Request, choice: Choice, position: int, token_report: TokenReport) -> None:
    """That of an output token. One that comes early waits, as its token does."""
    if position > len(choice.reports) and choice.apart is not None:
        choice.apart.reports[position] = token_report
        return
    if position != len(choice.reports):
        return
    fresh = [token_report]
    if choice.apart is not None:
        while (following := choice.apart.reports.pop(position + len(fresh), None)) is not None:
            fresh.append(following)
    choice.reports += fresh
    _describe(request, choice, ids_of(fresh))


def prompt_report(request: Request, choice: Choice, prompt_reports: Sequence[TokenReport]) -> None:
    """Those of the prompt's tokens."""
    if choice.prompt_reports is None:
        choice.prompt_reports = list(prompt_reports)
        _describe(request, choice, named_in_prompt(request, prompt_reports))


def describe_again(request: Request, choice: Choice) -> None:
    """Ask a new tokenizer for what is still to be told."""
    choice.describing.clear()
    _describe(request, choice, ids_of(choice.reports[choice.told_tokens :]))
    if choice.prompt_reports is not None and not choice.begun:
        _describe(request, choice, named_in_prompt(request, choice.prompt_reports))


def named_in_prompt(request: Request, prompt_reports: Iterable[TokenReport]) -> set[int]:
    """Ids that reports of the prompt name, and its first one, of which nothing is known but its text."""
    return {request.plan.prompt_ids[0]} | ids_of(prompt_reports)


def _describe(request: Request, choice: Choice, ids: set[int]) -> None:
    unknown = [i for i in ids if i not in request.tokens]
    if unknown:
        choice.describing.append(unknown)
        request.decoding.describe(choice, unknown)
