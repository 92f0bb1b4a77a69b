"""Proves from the event log, and from what clients saw, that no request was lost, doubled or left hanging, whatever failed meanwhile.

Pure: it is given lines and records, and gives back what is wrong with them, one sentence each.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, takewhile
from typing import Any

Event = Mapping[str, Any]
Key = tuple[int, int]


@dataclass(frozen=True)
class Fault:
    """Something that was done to the suite, at a time of the monotonic clock. `pid`: the process that died of it, if one did."""

    time: float
    what: str
    pid: int = 0


@dataclass(frozen=True)
class Answer:
    """What one client saw of one request with one choice, and what it should have seen."""

    request_id: str
    expected_ids: Sequence[int]
    expected_text: str
    ids: Sequence[int] = ()
    text: str = ""
    finish: str | None = None
    error: str | None = None
    ended: float = 0.0
    expected_finish: str = "length"


@dataclass
class Sums:
    """What the whole log tells, to be held against metrics."""

    requests: int = 0
    arrivals: int = 0
    kv_bytes: int = 0
    fallbacks: Counter[tuple[str, str]] = field(default_factory=Counter)


def read(lines: Iterable[str]) -> list[Event]:
    """The events of a log. Half a line at the end is what a process left that was killed in the middle of it."""
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def check(events: Sequence[Event], answers: Sequence[Answer], faults: Sequence[Fault], bound: float) -> list[str]:
    """What is wrong.

    Args:
        events: of all gateways.
        answers: of all requests that clients made.
        faults: everything that was done.
        bound: seconds in which whatever a fault has hit must be decided.
    """
    dead = deaths(faults).keys()
    wrong = [f"{event['count']} events were dropped" for event in events if event["event"] == "dropped"]
    requests = by_request(events)
    for key, history in requests.items():
        found = (_whole(history, key[0] in dead), _tokens(history), _halves(history), _fallbacks(history))
        wrong += [f"request {key}: {why}" for why in (*chain(*found), *_decided(history, faults, bound))]
    of_id = defaultdict(list)
    for history in requests.values():
        of_id[history[0].get("request_id")].append(history)
    for answer in answers:
        wrong += [f"{answer.request_id}: {why}" for why in _answered(answer, of_id[answer.request_id], faults, bound)]
    return wrong


def by_request(events: Sequence[Event]) -> dict[Key, list[Event]]:
    """The events of each request, in their order, by gateway process and number."""
    found: dict[Key, list[Event]] = defaultdict(list)
    for event in events:
        if "request" in event:
            found[event["pid"], event["request"]].append(event)
    return found


def sums(events: Sequence[Event]) -> Sums:
    """What the log tells in all."""
    told = Sums()
    for event in events:
        told.requests += event["event"] == "accepted"
        if event["event"] == "arrived":
            told.arrivals += 1
            told.kv_bytes += event["kv_bytes"]
        if event["event"] == "fallback":
            told.fallbacks[event["fallback"], event["reason"]] += 1
    return told


def _whole(history: Sequence[Event], dead: bool) -> Iterable[str]:
    """It begins once and ends once; only a gateway that was killed leaves it open."""
    names = [event["event"] for event in history]
    if names[0] != "accepted" or names.count("accepted") != 1:
        yield f"begins with {names[0]} and was accepted {names.count('accepted')} times"
    ends = names.count("ended")
    if ends != 1 and not (dead and ends == 0):
        yield f"ended {ends} times"
    if ends and names[-1] != "ended":
        yield f"{names[-1]} came after its end"
    times = [event["time"] for event in history]
    if times != sorted(times):
        yield "time ran backwards"


def _tokens(history: Sequence[Event]) -> Iterable[str]:
    """Each position has one token, whoever tells it; the client is told each once, in order, and none before all to its left are known.

    Two executors are two streams: what the one that decodes draws may be heard before the token that it was handed.
    """
    ids: dict[int, dict[int, int]] = defaultdict(dict)
    told: Counter[int] = Counter()
    for event in history:
        choice = event.get("choice", 0)
        if event["event"] == "token":
            known = ids[choice].setdefault(event["position"], event["id"])
            if known != event["id"]:
                yield f"choice {choice}: token {event['position']} was {known} and then {event['id']}"
        elif event["event"] == "told":
            if event["first"] != told[choice]:
                yield f"choice {choice}: the client was told from {event['first']} on, behind {told[choice]}"
            told[choice] = event["first"] + event["tokens"]
            if told[choice] > len(_in_a_row(ids[choice])):
                yield f"choice {choice}: the client was told {told[choice]} tokens of {len(_in_a_row(ids[choice]))}"
    end = history[-1]
    if end["event"] == "ended" and end["told"] != [told[choice] for choice in range(len(end["told"]))]:
        yield f"ended with {end['told']} tokens, and {dict(told)} were told"
    if end["event"] == "ended" and end["outcome"] == "answered":
        gaps = [choice for choice, known in ids.items() if len(_in_a_row(known)) < len(known)]
        yield from (f"choice {choice}: tokens {sorted(ids[choice])} have a gap" for choice in gaps)


def _in_a_row(known: Mapping[int, int]) -> list[int]:
    """Tokens from position 0 on up to the first that is not known."""
    return [known[position] for position in takewhile(known.__contains__, count())]


def _halves(history: Sequence[Event]) -> Iterable[str]:
    """Only an executor that was started tells, and one that decodes behind KV only once that has come."""
    started: dict[tuple[int, str], str] = {}
    reserved, arrived = set(), set()
    for event in history:
        where = event.get("choice", 0), event.get("executor_id", "")
        match event["event"]:
            case "started":
                started[where] = event["half"]
                arrived.discard(where)
            case "reserved":
                reserved.add(where)
            case "arrived":
                if where not in reserved:
                    yield f"choice {where[0]}: KV arrived at {where[1]}, which had reserved nothing"
                arrived.add(where)
            case "token" if where not in started:
                yield f"choice {where[0]}: {where[1]} told a token and was never started"
            case "token" if started[where] == "decode" and where not in arrived:
                yield f"choice {where[0]}: {where[1]} told a token before its KV arrived"


def _fallbacks(history: Sequence[Event]) -> Iterable[str]:
    """Each says why, and the last one is the one that the answer tells."""
    told = [event for event in history if event["event"] == "fallback"]
    yield from (f"the fallback {event['fallback']} has no reason" for event in told if not event["reason"])
    last, end = told[-1]["fallback"] if told else None, history[-1]
    if end["event"] == "ended" and end["fallback"] != last:
        yield f"ended with fallback {end['fallback']}, and the last one was {last}"


def reactions(history: Sequence[Event], fault: Fault) -> Iterator[tuple[int, float]]:
    """Each choice that ran when something failed, and the seconds until it moved on, or ended with the request; infinite: it never has.

    What waits for a place has been decided already: it was placed nowhere yet, or is to be placed again.
    """
    end = history[-1]
    before = [event for event in history if event["time"] <= fault.time]
    names = [event["fallback"] if event["event"] == "fallback" else event["event"] for event in before]
    state = next((name for name in reversed(names) if name in {"placed", "replaced", "ended"}), None)
    if state != "placed" or fault.pid == history[0]["pid"]:
        return
    for choice in sorted({event["choice"] for event in before if event["event"] == "started"}):
        told = [event["first"] + event["tokens"] for event in before if event["event"] == "told" and event["choice"] == choice]
        if end["event"] == "ended" and told[-1:] == end["told"][choice : choice + 1]:
            continue  # it was complete, and others were not
        mine = (event["time"] for event in history if event["time"] > fault.time and event.get("choice", choice) == choice)
        yield choice, next(mine, math.inf) - fault.time


def deaths(faults: Sequence[Fault]) -> dict[int, float]:
    """When processes died of faults."""
    return {fault.pid: fault.time for fault in faults if fault.pid}


def _decided(history: Sequence[Event], faults: Sequence[Fault], bound: float) -> Iterable[str]:
    """Each choice that a fault has hit was decided within the bound, unless its gateway died first."""
    died = deaths(faults).get(history[0]["pid"], math.inf)
    for fault in faults:
        for choice, seconds in reactions(history, fault):
            if seconds > bound and died > fault.time + bound:
                late = "never" if seconds == math.inf else f"after {seconds:.2f} s"
                yield f"choice {choice} moved on {late} when this happened: {fault.what}"


def drawn(history: Sequence[Event], choice: int = 0) -> list[int]:
    """The tokens of a choice."""
    return _in_a_row(
        {event["position"]: event["id"] for event in history if event["event"] == "token" and event["choice"] == choice}
    )


def _answered(answer: Answer, histories: Sequence[Sequence[Event]], faults: Sequence[Fault], bound: float) -> Iterable[str]:
    if list(answer.ids) != list(answer.expected_ids[: len(answer.ids)]):
        at = next(i for i, (got, due) in enumerate(zip([*answer.ids, None], answer.expected_ids, strict=False)) if got != due)
        yield f"its tokens differ from the undisturbed run's from {at} on"
    died = any(history[0]["pid"] in deaths(faults) for history in histories)  # and has not written all of its log
    if not died and answer.ids and not any(drawn(history)[: len(answer.ids)] == list(answer.ids) for history in histories):
        yield "no request of the log drew these tokens"
    yield from _served(answer, histories, died=died) if answer.error is None else _failed(answer, histories, faults, bound)


def _served(answer: Answer, histories: Sequence[Sequence[Event]], *, died: bool) -> Iterable[str]:
    if answer.text != answer.expected_text or len(answer.ids) != len(answer.expected_ids):
        yield f"its text differs from the undisturbed run's, or ends after {len(answer.ids)} of {len(answer.expected_ids)} tokens"
    if answer.finish != answer.expected_finish:
        yield f"it finished with {answer.finish} where {answer.expected_finish} was due"
    if len(histories) != 1:
        yield f"answered, and accepted {len(histories)} times"
    elif not died and histories[0][-1].get("outcome") != "answered":
        yield f"answered, and the log says {histories[0][-1].get('outcome')}"


def _failed(answer: Answer, histories: Sequence[Sequence[Event]], faults: Sequence[Fault], bound: float) -> Iterable[str]:
    if answer.error == "InternalError":
        yield "it failed with a defect"
    for history in histories:
        died = next((fault.time for fault in faults if fault.pid == history[0]["pid"]), None)
        # The end of an answer may be on its way to the client when its gateway dies.
        on_its_way = died is not None and history[-1]["time"] <= died <= answer.ended
        if history[-1].get("outcome") == "answered" and not on_its_way:
            yield f"failed with {answer.error}, and the log says it was answered"
        if died is not None and answer.ended > died + bound:
            yield f"its gateway died, and it heard of it {answer.ended - died:.2f} s later"
