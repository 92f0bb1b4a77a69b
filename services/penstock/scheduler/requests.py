"""A request as the scheduler keeps it: waiting in a lane, waiting for any executor, or leased."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.scheduler.model import Needs

if TYPE_CHECKING:
    from penstock.scheduler.executors import Hold
    from penstock.scheduler.lanes import Lane

__all__ = ["Request", "load_tokens"]

# The least goes first: what was running goes before all that is new, for its client is reading.
_REPLACING, _NEW = 0, 1


def load_tokens(needs: Needs, expected_output: int) -> int:
    """Tokens that a request is expected to put on an executor: answers are seldom as long as they may be."""
    return needs.prompt_tokens + needs.choices * min(needs.max_tokens, expected_output)


class Request:
    """Identity is the object itself. At most one of `lane` and `hold` is set; neither while it waits for any executor to come.

    `prefill_hold` is set beside `hold` for as long as its prefill runs on another executor.
    """

    __slots__ = (
        "arrived",
        "deadline",
        "deadline_tick",
        "gateway",
        "hold",
        "lane",
        "leased_tokens",
        "needs",
        "order",
        "prefill_hold",
        "prefill_tokens",
        "rank",
        "request_id",
        "stranded_tick",
        "tokens",
    )

    def __init__(self, gateway: int, request_id: int, needs: Needs, *, order: int, arrived: float, tokens: int) -> None:
        self.gateway = gateway
        self.request_id = request_id
        self.needs = needs
        self.order = order
        self.arrived = arrived
        self.tokens = tokens
        self.rank = _REPLACING if needs.replacing else _NEW
        self.deadline = None if needs.deadline is None else arrived + needs.deadline
        self.deadline_tick: int | None = None
        self.stranded_tick: int | None = None
        self.lane: Lane | None = None
        self.hold: Hold | None = None
        self.leased_tokens = 0
        self.prefill_hold: Hold | None = None
        self.prefill_tokens = 0
