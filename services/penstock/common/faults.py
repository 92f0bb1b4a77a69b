"""Fault points: named places at which tests let a process die or stop, or have a message lost, doubled, late, corrupted or stale.

Production code passes them (`reach`, `through`) and nothing comes of it: that costs one comparison. `arm` turns them on, for a
process that was started with ``PENSTOCK_FAULTS=FOLDER``, and says so in the log. The folder then says what is to fail:

- ``rules.jsonl`` holds a rule in each line (`Rule`). It is read again whenever it has changed, so that one cluster serves for many
  faults. Replace it, do not write into it.
- ``fired-ID`` is written before a rule's action is taken, by whichever process comes first; a rule is obeyed once, over all
  processes and restarts. It holds a JSON object: point, action, pid, and time of the monotonic clock.
"""

from __future__ import annotations

import enum
import json
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from penstock.common.logs import logger

__all__ = ["FIRED", "MESSAGES", "POINTS", "RULES", "Action", "Cut", "Rule", "arm", "armed", "disarm", "reach", "through"]

RULES: Final = "rules.jsonl"
FIRED: Final = "fired-"

# Of a handoff, those that the side that prefills says and those that the other answers.
MESSAGES: Final = (
    *("reserve", "push", "commit", "renew", "abort", "release"),
    *("reserved", "pushed", "ack", "renewed", "aborted", "refused"),
)

# Every point, and what has just happened there.
POINTS: Final[Mapping[str, str]] = {
    "gateway.accepted": "a request has been validated and encoded, and asks for its place",
    "gateway.placed": "its lease has come",
    "gateway.reserved": "the executor that is to decode has blocks for its KV",
    "gateway.token": "a frame of tokens has come",
    "gateway.arrived": "the executor that decodes has its KV",
    "gateway.handed_off": "the executor that prefilled is done with it",
    "gateway.handoff_failed": "one of the two has given the handoff up",
    "executor.receive": "a sequence is to be decoded here behind a prefill elsewhere",
    "executor.send": "a sequence is to be prefilled here for another executor",
    "executor.reserved": "blocks are reserved for KV that is to come, and nobody was told",
    "executor.drawn": "the first token of a sequence that is handed over was drawn",
    "handoff.introduce": "a stream to another executor is open",
    "handoff.welcome": "a stream of another executor is taken",
    "handoff.attach": "memory that both executors have is mapped",
    "scheduler.asked": "a gateway asks for places",
    "scheduler.granted": "a lease is granted and not told yet",
    "scheduler.prefilled": "a gateway gives the prefill half of a lease back",
    **{f"handoff.{message}.sent": f"{message} is about to be sent" for message in MESSAGES},
    **{f"handoff.{message}.received": f"{message} has come, and nothing was done about it" for message in MESSAGES},
}

M = TypeVar("M")


class Action(enum.Enum):
    """What happens at a point. The first two happen to the process, the others to the message that passes."""

    KILL = "kill"  # SIGKILL, by itself
    STOP = "stop"  # SIGSTOP, by itself; who armed it lets it go on
    CUT = "cut"  # the stream breaks before the message
    LOSE = "lose"
    DOUBLE = "double"
    LATE = "late"  # it comes behind the first message of its lane that passes `seconds` later
    CORRUPT = "corrupt"
    STALE = "stale"  # from an older epoch


class Cut(ConnectionError):
    """A stream breaks here because a rule says so."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One fault.

    Attributes:
        id: names the rule; part of a file's name.
        nth: passes of one process at the point, from when the rule came, of which this one fails.
        seconds: see `Action.LATE`.
        pid: the process that is meant; 0: any.
    """

    id: str
    point: str
    action: Action
    nth: int = 1
    seconds: float = 0.0
    pid: int = 0

    def line(self) -> str:
        """The rule as it stands in the file."""
        fields = {"id": self.id, "point": self.point, "action": self.action.value, "nth": self.nth}
        return json.dumps({**fields, "seconds": self.seconds, "pid": self.pid})

    @classmethod
    def parse(cls, line: str) -> Rule:
        """The rule that a line holds.

        Raises:
            ValueError: it holds none.
        """
        fields = json.loads(line)
        try:
            return cls(**{**fields, "action": Action(fields["action"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no rule: {line!r}") from error


class _Armed:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._rules: Sequence[Rule] = ()
        self._passes: Counter[str] = Counter()
        self._late: dict[Hashable, deque[tuple[float, Any]]] = {}

    def fires(self, point: str) -> Rule | None:
        """The rule that is to be obeyed at this pass."""
        with self._lock:
            self._read()
            found = None
            for rule in self._rules:
                if rule.point != point or rule.pid not in {0, os.getpid()}:
                    continue
                self._passes[rule.id] += 1
                if found is None and self._passes[rule.id] == rule.nth and self._claim(rule):
                    found = rule
            return found

    def _read(self) -> None:
        try:
            file = (self._folder / RULES).stat()
        except FileNotFoundError:
            self._rules = ()
            return
        if self._seen != (file.st_ino, file.st_mtime_ns):
            self._rules = [Rule.parse(line) for line in (self._folder / RULES).read_text(encoding="utf-8").splitlines()]
            self._seen = file.st_ino, file.st_mtime_ns

    def _claim(self, rule: Rule) -> bool:
        """Whether nobody has obeyed it before."""
        facts = {"point": rule.point, "action": rule.action.value, "pid": os.getpid(), "time": time.monotonic()}
        claim = self._folder / f".{FIRED}{rule.id}-{os.getpid()}-{threading.get_ident()}"
        claim.write_text(json.dumps(facts), encoding="utf-8")
        try:
            os.link(claim, self._folder / f"{FIRED}{rule.id}")  # whole at once: who waits for it reads it right away
        except FileExistsError:
            return False
        finally:
            claim.unlink()
        logger().warning("fault", rule=rule.id, point=rule.point, action=rule.action.value)
        return True

    def hold(self, lane: Hashable, until: float, message: Any) -> None:
        with self._lock:
            self._late.setdefault(lane, deque()).append((until, message))

    def due(self, lane: Hashable) -> list[Any]:
        """Messages that were held back long enough."""
        with self._lock:
            held = self._late.get(lane)
            now, due = time.monotonic(), []
            while held and held[0][0] <= now:
                due.append(held.popleft()[1])
            return due


_armed: _Armed | None = None


def arm(folder: Path) -> None:
    """Obey the folder's rules from now on, in this process."""
    global _armed  # noqa: PLW0603 - points are passed wherever they stand; nobody could hand them an object
    _armed = _Armed(folder)
    logger().warning("FAULT POINTS ARE ARMED: this process is meant to fail; it is no place for production", folder=str(folder))


def disarm() -> None:
    """Pass all points without harm again."""
    global _armed  # noqa: PLW0603 - the same
    _armed = None


def armed() -> bool:
    """Whether points do anything."""
    return _armed is not None


def reach(point: str) -> None:
    """Pass a point where the process can fail."""
    if _armed is not None and (rule := _armed.fires(point)) is not None and rule.action in {Action.KILL, Action.STOP}:
        _end(rule)


def through(point: str, message: M, alter: Callable[[Action, M], M], lane: Hashable = None) -> Sequence[M]:
    """Pass a message through a point: what comes out is to be handled in its place.

    `alter` makes a corrupted, or stale, copy of a message. `lane` is what messages come late on, such as two executors' connection.

    Raises:
        Cut: the stream is to break.
    """
    if _armed is None:
        return (message,)
    rule = _armed.fires(point)
    passed = [message] if rule is None else _treat(_armed, rule, message, alter, lane)
    return [*passed, *_armed.due(lane)] if passed else passed


def _treat(by: _Armed, rule: Rule, message: M, alter: Callable[[Action, M], M], lane: Hashable) -> list[M]:
    match rule.action:
        case Action.KILL | Action.STOP:
            _end(rule)
            return [message]
        case Action.CUT:
            raise Cut(f"fault {rule.id} at {rule.point}")
        case Action.LOSE:
            return []
        case Action.DOUBLE:
            return [message, message]
        case Action.LATE:
            by.hold(lane, time.monotonic() + rule.seconds, message)
            return []
        case Action.CORRUPT | Action.STALE:
            return [alter(rule.action, message)]


def _end(rule: Rule) -> None:
    os.kill(os.getpid(), signal.SIGKILL if rule.action is Action.KILL else signal.SIGSTOP)
