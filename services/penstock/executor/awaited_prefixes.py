"""Prefixes that are not there yet and soon will be: a prompt that begins with one had better wait than compute it too."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from penstock.executor.sequence import Sequence, Sink

__all__ = ["AwaitedPrefixes"]

# Tokens of a prefix that others compute now for which a prompt waits.
WORTH_WAITING_FOR = 64

# Whose request, and which.
_Request = tuple[Sink, str | int]


def _request_of(sequence: Sequence) -> _Request:
    request = sequence.request
    return sequence.sink, request.request_id or request.sequence_id


class AwaitedPrefixes:
    """Of blocks, by their hashes, that prompts will have filled when they are through.

    All wait for prompts that run, and for those whose KV has begun to come. For one whose KV has not, only other choices of its
    request wait, which would compute what is on its way: it may be the last of many where it is to be computed.

    Args:
        running: those that compute.
        receiving: those that wait for KV.
    """

    def __init__(self, running: Iterable[Sequence], receiving: Iterable[Sequence], block_size: int) -> None:
        self._least = -(-WORTH_WAITING_FOR // block_size)
        self._block_size = block_size
        computing = (s for s in running if s.remaining > 1)
        arriving = (s for s in receiving if s.arriving)
        self._by_all = {key for s in chain(computing, arriving) for key in s.fresh_hashes}
        self._by_choices: dict[_Request, set[bytes]] = {}
        for sequence in receiving:
            self._by_choices.setdefault(_request_of(sequence), set()).update(sequence.fresh_hashes)

    def add(self, sequence: Sequence) -> None:
        """A sequence that was just admitted."""
        request = _request_of(sequence)
        (self._by_choices.setdefault(request, set()) if sequence.awaits_kv else self._by_all).update(sequence.fresh_hashes)

    def worth_waiting_for(self, sequence: Sequence, cached: int) -> bool:
        """Whether so much of a prompt, behind the blocks that were found, is awaited that sharing it is worth a wait."""
        by_choices = self._by_choices.get(_request_of(sequence), set())
        usable = (len(sequence.ids) - 1) // self._block_size
        if not (self._by_all or by_choices) or sequence.wants_prompt_logprobs or usable - cached < self._least:
            return False
        return all(key in self._by_all or key in by_choices for key in sequence.hashes[cached : cached + self._least])
