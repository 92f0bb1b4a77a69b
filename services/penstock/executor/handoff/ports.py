"""Between the engine (`executor/engine_handoff.py`), which owns KV blocks, and the handoff, which owns tickets, leases and streams.

A sequence with `SequenceRequest.handoff` set goes through both. Its handle is the same object in every call. Where it decodes:
`reserved`, then any number of `import_kv`, then `begin_decode`, `fail` or `leave`. Where it prefills: `begun`, then `computed`
after every step of it and any number of `export_kv`, then `drawn`, and at last `handed_off` or `fail`. `ended` may come at any time
behind the first of these, and nothing follows it: what is asked for the handle afterwards is answered with `SequenceEnded`.
`begin_decode`, `handed_off`, `leave` and `fail` take effect at the engine's next step, unless the sequence has ended by then: then
`ended` comes in spite of them. Once one has taken effect, nothing more is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from numpy.typing import NDArray

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Arrival, Ticket
from penstock.executor.sequence import SequenceRequest

__all__ = ["Exported", "Handle", "HandoffEvents", "Imported", "KvEngine", "SequenceEnded", "always"]


class SequenceEnded(RuntimeError):
    """The sequence is not in the engine any more."""


class Handle(Protocol):
    """A sequence of the engine, as far as the handoff knows it. Compared by identity."""

    @property
    def request(self) -> SequenceRequest:
        """What was asked."""


def always() -> bool:
    """Whatever is asked for is wanted."""
    return True


Exported = Callable[[NDArray[Any] | Exception], None]
Imported = Callable[[Exception | None], None]


class HandoffEvents(Protocol):
    """What the engine tells, in its own thread but for `begun`. Every call returns at once and raises nothing."""

    def reserved(self, handle: Handle, cached_tokens: int, tokens: int) -> Ticket:
        """A `Receive` sequence has its blocks; the ticket is told to its sink."""

    def begun(self, handle: Handle) -> None:
        """A `Send` sequence has come, told by whichever thread submits it; it may wait long before its first step."""

    def computed(self, handle: Handle, tokens: int) -> None:
        """KV of a `Send` sequence's first `tokens` tokens stands in its blocks."""

    def drawn(self, handle: Handle, token: int) -> None:
        """A `Send` sequence's first token was drawn and told, and is not its last.

        KV of all tokens before it stands in its blocks, which stay until `handed_off`, `fail` or `ended`.
        """

    def ended(self, handle: Handle) -> None:
        """The sequence ended by anything but the handoff's own `handed_off`, `leave` or `fail`.

        It finished with its first token, was aborted, was late, or failed with the backend.
        """


class KvEngine(Protocol):
    """What the handoff asks of the engine, from any thread. Answers come in the engine's thread, between steps."""

    def export_kv(
        self, handle: Handle, tokens: range, *, native: bool, done: Exported, wanted: Callable[[], bool] = always
    ) -> None:
        """Copy KV out of the sequence's blocks.

        Canonical: [layer, 2, token, kv head, head dim]. Native: whole blocks as the cache holds them, uint8 [block, bytes], where
        `tokens` begin at a block's begin. A copy that is not `wanted` any more when its turn comes is not made, and answered with
        `SequenceEnded`.
        """

    def import_kv(self, handle: Handle, tokens: range, data: NDArray[Any], *, native: bool, done: Imported) -> None:
        """Copy KV into the sequence's blocks, in the same forms. `data` is read until `done`."""

    def begin_decode(self, handle: Handle, first_token: int, arrival: Arrival) -> None:
        """All KV has been imported: decode behind this token, which is told by the other side."""

    def handed_off(self, handle: Handle) -> None:
        """The other side decodes: the sequence ends here with `Finish.HANDED_OFF`."""

    def leave(self, handle: Handle) -> None:
        """The sequence has ended on the other side, which has told how: it ends here too, and nothing more is told of it."""

    def fail(self, handle: Handle, failure: HandoffFailure, message: str) -> None:
        """The sequence ends here with `Finish.HANDOFF_FAILED`."""
