"""The checker finds nothing wrong with histories that are right, and something with each that was tampered with."""

import copy
from dataclasses import replace

import pytest
from history import Answer, Fault, check, read, sums
from hypothesis import given, settings
from hypothesis import strategies as st

PREFILL, DECODE = "prefill-1", "decode-1"
BOUND = 6.0

# How an attempt at a request goes: where it is broken off, None for the last one, which is not; behind how many tokens.
BREAKS = ("placed", "reserved", "first token", "arrived", "decoding")
attempts = st.lists(st.tuples(st.sampled_from(BREAKS), st.integers(0, 3), st.booleans()), max_size=3)


class Play:
    """Writes the log of one gateway that serves one request after another, and what their clients saw."""

    def __init__(self, pid=1):
        self.pid, self.time, self.number = pid, 100.0, 0
        self.events, self.answers, self.faults = [], [], []
        self._add("opened", service="gateway")

    def _add(self, event, **facts):
        self.time += 0.01
        self.events.append({"time": self.time, "pid": self.pid, "event": event, **facts})

    def tell(self, event, **facts):
        self._add(event, request=self.number, **facts)

    def request(self, broken, length=9):
        self.number += 1
        self.drawn, self.sent, fallback = [], 0, None
        self.tell("accepted", request_id=f"r{self.number}", choices=1)
        self.ids = [self.number * 100 + i for i in range(length)]
        for where, more, replaced in broken:
            self.attempt(where, more)
            self.faults.append(Fault(self.time, f"broken at {where}"))
            fallback = "replaced" if replaced else "recompute_on_decode"
            self.tell("fallback", choice=0, fallback=fallback, reason="lease_expired")
        self.attempt(None, length)
        self.tell("ended", outcome="answered", told=[self.sent], fallback=fallback)
        text = "".join(map(chr, self.ids))
        self.answers.append(Answer(f"r{self.number}", self.ids, text, self.ids, text, "length", None, self.time))

    def attempt(self, where, more):
        apart = not self.drawn
        self.tell("placed", executor_id=DECODE, prefill_executor_id=PREFILL if apart else None)
        self.tell("started", choice=0, executor_id=DECODE, half="decode" if apart else "together")
        if where == "placed":
            return
        if apart:
            self.tell("reserved", choice=0, executor_id=DECODE)
            self.tell("started", choice=0, executor_id=PREFILL, half="prefill")
            if where == "reserved":
                return
            self.draw(PREFILL, 1)
            if where == "first token":
                return
            self.tell("arrived", choice=0, executor_id=DECODE, kv_bytes=64)
        if where != "arrived":
            self.draw(DECODE, more)

    def draw(self, executor, count):
        for _ in range(min(count, len(self.ids) - len(self.drawn))):
            self.drawn.append(self.ids[len(self.drawn)])
            self.tell("token", choice=0, executor_id=executor, position=len(self.drawn) - 1, id=self.drawn[-1])
        if len(self.drawn) > self.sent:
            self.tell("told", choice=0, first=self.sent, tokens=len(self.drawn) - self.sent)
            self.sent = len(self.drawn)


@st.composite
def plays(draw):
    play = Play()
    for broken in draw(st.lists(attempts, min_size=1, max_size=3)):
        play.request(broken)
    return play


def verdict(play):
    return check(play.events, play.answers, play.faults, BOUND)


@given(plays())
def test_right_histories_are_right(play):
    assert verdict(play) == []


def drop(name):
    def tamper(events, draw):
        del events[draw(st.sampled_from([i for i, e in enumerate(events) if e["event"] == name]))]

    return tamper


def repeat(name):
    def tamper(events, draw):
        i = draw(st.sampled_from([i for i, e in enumerate(events) if e["event"] == name]))
        events.insert(i, events[i])

    return tamper


def change(name, **facts):
    def tamper(events, draw):
        chosen = draw(st.sampled_from([e for e in events if e["event"] == name]))
        chosen |= {key: fact(chosen[key]) for key, fact in facts.items()}

    return tamper


TAMPERINGS = {
    "a request that was never accepted": drop("accepted"),
    "a request accepted twice": repeat("accepted"),
    "a request without an end": drop("ended"),
    "a request that ended twice": repeat("ended"),
    "a lost token": drop("token"),
    "another token at a place that has one": change("token", id=lambda i: i + 1),
    "text that was not told": drop("told"),
    "text that was told twice": repeat("told"),
    "more told than drawn": change("told", tokens=lambda n: n + 1),
    "a token of nobody's": change("token", executor_id=lambda _: "stranger"),
    "an end that tells another count": change("ended", told=lambda told: [told[0] + 1]),
    "an end that tells another fallback": change("ended", fallback=lambda told: "replaced" if told is None else None),
    "an answer the log knows as failed": change("ended", outcome=lambda _: "Unavailable"),
    "time that runs backwards": change("ended", time=lambda t: t - 50),
    "another gateway's request": change("ended", pid=lambda pid: pid + 1),
    "events that were dropped": lambda events, _: events.append({"time": 1e6, "pid": 1, "event": "dropped", "count": 3}),
}


@pytest.mark.parametrize("what", TAMPERINGS)
@settings(max_examples=25)
@given(play=plays(), data=st.data())
def test_tampering_with_the_log_is_found(what, play, data):
    before = copy.deepcopy(play.events)
    TAMPERINGS[what](play.events, data.draw)
    assert play.events != before
    assert verdict(play) != []


@pytest.mark.parametrize(("missing", "why"), [("reserved", "reserved nothing"), ("arrived", "before its KV arrived")])
def test_kv_that_nobody_waited_for_or_that_never_came_is_found(missing, why):
    play = Play()
    play.request([])
    play.events = [event for event in play.events if event["event"] != missing]
    assert any(why in found for found in verdict(play))


@given(st.integers(0, 3), st.booleans())
def test_a_fallback_without_a_reason_is_found(more, replaced):
    play = Play()
    play.request([("decoding", more, replaced)])
    next(e for e in play.events if e["event"] == "fallback")["reason"] = ""
    assert any("no reason" in why for why in verdict(play))


SIGHTS = {
    "lost token": lambda a: replace(a, ids=a.ids[:3] + a.ids[4:]),
    "doubled token": lambda a: replace(a, ids=a.ids[:3] + a.ids[2:]),
    "cut short": lambda a: replace(a, ids=a.ids[:-1], text=a.text[:-1]),
    "another finish": lambda a: replace(a, finish="stop"),
    "another text": lambda a: replace(a, text=a.text + "!"),
    "never asked": lambda a: replace(a, request_id="elsewhere"),
    "failed where the log says answered": lambda a: replace(a, error="Unavailable"),
    "a defect": lambda a: replace(a, request_id="elsewhere", error="InternalError"),
}


@pytest.mark.parametrize("what", SIGHTS)
@settings(max_examples=10)
@given(play=plays())
def test_a_client_that_saw_something_else_is_found(what, play):
    play.answers[-1] = SIGHTS[what](play.answers[-1])
    assert verdict(play) != []


@given(plays(), st.floats(0.5, 20))
def test_what_is_decided_too_late_is_found(play, seconds):
    # After the first fault time stands still for everybody.
    if not play.faults:
        return
    at = play.faults[0].time
    for event in play.events:
        event["time"] += seconds if event["time"] > at else 0
    faults = play.faults[:1]
    found = check(play.events, play.answers, faults, BOUND)
    assert any("moved on after" in why for why in found) == (seconds + 0.01 > BOUND)


def test_a_choice_that_hangs_is_found_though_another_goes_on():
    play = Play()
    play.request([])
    at = next(i for i, e in enumerate(play.events) if e["event"] == "arrived")
    fault = Fault(play.events[at]["time"], "the other choice is lost")
    play.events.insert(at, play.events[at] | {"event": "started", "choice": 1, "half": "together"})
    play.events[-1]["time"] += BOUND + 1
    play.events[-1]["told"].append(3)
    (wrong,) = (why for why in check(play.events, [], [fault], BOUND) if "moved on" in why)
    assert "choice 1 moved on after" in wrong


def test_what_is_never_decided_is_found():
    play = Play()
    play.request([("decoding", 3, True)])
    cut = next(i for i, e in enumerate(play.events) if e["event"] == "fallback")
    del play.events[cut:]
    assert any("never" in why for why in check(play.events, [], play.faults, BOUND))


def test_a_killed_gateway_leaves_its_requests_open_and_its_clients_hear_of_it_in_time():
    play = Play(pid=7)
    play.request([])
    del play.events[-4:]
    died = Fault(play.events[-1]["time"], "kill the gateway", pid=7)
    seen = replace(play.answers[0], ids=play.ids[:2], text="", error="Unavailable", ended=died.time + 1)
    assert check(play.events, [seen], [died], BOUND) == []
    assert check(play.events, [seen], [], BOUND) != []
    late = replace(seen, ended=died.time + BOUND + 1)
    assert check(play.events, [late], [died], BOUND) != []


def test_the_end_of_an_answer_may_be_lost_with_its_gateway_alone():
    play = Play(pid=7)
    play.request([])
    died = Fault(play.time + 0.1, "kill the gateway", pid=7)
    seen = replace(play.answers[0], finish=None, error="Unavailable", ended=died.time + 0.1)
    assert check(play.events, [seen], [died], BOUND) == []
    told_before = replace(seen, ended=died.time - 0.05)
    assert check(play.events, [told_before], [died], BOUND) != []
    assert check(play.events, [seen], [replace(died, pid=8)], BOUND) != []


def test_a_gateway_that_dies_within_the_bound_decides_no_more():
    play = Play(pid=7)
    play.request([])
    del play.events[-4:]
    hit = Fault(play.events[-1]["time"], "lose a message")
    died = Fault(hit.time + BOUND / 2, "kill the gateway", pid=7)
    assert check(play.events, [], [hit, died], BOUND) == []
    late = replace(died, time=hit.time + BOUND + 1)
    assert check(play.events, [], [hit, late], BOUND) != []
    seen = replace(play.answers[0], ids=play.ids[:7], text="", error="Unavailable", ended=died.time + 1)
    assert check(play.events[:-4], [seen], [hit, died], BOUND) == [], "the last of its log was not written"
    assert check(play.events[:-4], play.answers, [hit, died], BOUND) == [], "nor that it had answered"


def test_half_a_line_is_what_a_killed_process_leaves():
    assert read(['{"event": "opened", "pid": 1}', '{"event": "tok']) == [{"event": "opened", "pid": 1}]


def test_sums_are_of_all_requests():
    play = Play()
    play.request([])
    play.request([("decoding", 1, False), ("decoding", 1, True)])
    told = sums(play.events)
    assert (told.requests, told.arrivals, told.kv_bytes) == (2, 2, 128)
    assert dict(told.fallbacks) == {("recompute_on_decode", "lease_expired"): 1, ("replaced", "lease_expired"): 1}
