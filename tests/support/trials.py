"""What every test of the matrix does: have something fail under a few requests, and prove afterwards that nothing came of it."""

from __future__ import annotations

import threading
import urllib.request
from collections import Counter
from collections.abc import Sequence

from history import Answer, check
from pools import BOUND, LEASE, Clients, Fails, Pools
from prometheus_client.parser import text_string_to_metric_families
from suite import wait_for

from penstock.common.faults import Action, Rule


class Trial:
    """A suite, clients whose answers are known, and its counts while nothing is in work."""

    def __init__(self, pools: Pools, clients: Clients, prefill: int = 1, decode: int = 1) -> None:
        self.pools, self.clients = pools, clients
        self._sizes = prefill, decode

    def whole(self) -> None:
        """Wait until every service is there."""
        assert wait_for(lambda: self.pools.whole(*self._sizes), 60), self.pools.log[-20:]

    def run(self, *faults: Fails, requests: Sequence[int] = (4,), leaving: int = 0) -> None:
        """Every fault takes place, and each request is answered as it would have been, or told why not; all comes back.

        `requests`: so many at once; behind the first number, only while a fault has not taken place. `leaving`: requests beside
        them whose clients leave before they are answered.
        """
        pools = self.pools
        self.whole()
        assert wait_for(lambda: hands_over_again(pools, self.clients), 60), pools.log[-20:]  # the trial before has been forgotten
        pools.assert_idle()  # and those by which this asks
        assert wait_for(lambda: settled(pools))
        before, since = pools.held(), len(pools.events())
        rules = pools.arm(*faults)
        answered = threading.Event()
        others = [
            threading.Thread(target=self._leave, args=(leaving, rules)),
            threading.Thread(target=self._go_on, args=(rules, answered)),
        ]
        for other in others:
            other.start()
        answers: list[Answer] = []
        for count in requests:
            answers += self.clients.ask_all(count)
            if all(map(pools.fired, rules)):
                break
        answered.set()
        for other in others:
            other.join()
        wait_for(lambda: all(pools.fired(rule) for rule in rules), 5)  # what is said behind the last answer may be on its way
        fired = [pools.fired(rule) for rule in rules]
        pools.disarm()
        pools.let_go_on()
        assert all(fired), (
            f"did not take place: {[str(f) for f, done in zip(faults, fired, strict=True) if not done]}; {tally(pools, since)}"
        )
        self.whole()
        pools.assert_back_to(before)
        assert wait_for(lambda: settled(pools)), "the event log is not written"
        wrong = check(pools.events()[since:], answers, [fault for fault in fired if fault], BOUND)
        assert wrong == [], "\n".join([*wrong, *pools.log[-40:]])
        assert counted(pools) == logged(pools)

    def _leave(self, count: int, rules: Sequence[Rule]) -> None:
        """Who leaves may do so while nothing of his is on its way, or be told of by the other executor first: several times, then."""
        for _ in range(10 if count else 0):
            self.clients.leave(count)
            if all(self.pools.fired(rule) for rule in rules):
                return

    def _go_on(self, rules: Sequence[Rule], answered: threading.Event) -> None:
        """Let a gateway or a scheduler that was stopped go on after a lease: others run its sequences, but nobody answers for it."""
        stops = [rule for rule in rules if rule.action is Action.STOP and rule.point.startswith(("gateway.", "scheduler."))]
        if stops and wait_for(lambda: answered.is_set() or all(map(self.pools.fired, stops)), 60) and not answered.wait(LEASE):
            self.pools.let_go_on()


def hands_over_again(pools: Pools, clients: Clients) -> bool:
    """Whether KV goes from one executor to the other, twice.

    A pair that has just failed is left alone for a while, and then tried with one request; others are placed so again only when the
    scheduler has heard how that went.
    """
    return all(_hands_over(pools, clients) for _ in range(2))


def _hands_over(pools: Pools, clients: Clients) -> bool:
    since = len(pools.events())
    clients.ask(0)
    assert wait_for(lambda: settled(pools))
    happened = {event["event"] for event in pools.events()[since:]}
    return "handed off" in happened and "fallback" not in happened


def settled(pools: Pools) -> bool:
    """Whether the log has the end of every request that a living gateway has accepted."""
    living = {process.pid for process in pools.services("gateway")}
    names: Sequence[str] = [event["event"] for event in pools.events() if event["pid"] in living]
    return names.count("accepted") == names.count("ended")


def counted(pools: Pools) -> Counter[str]:
    """Tokens that were told and fallbacks by reason, since the living gateway's start: by its metrics."""
    with urllib.request.urlopen(f"http://{pools.http}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    found = Counter({f"fallback {s.labels['reason']}": int(s.value) for s in samples if s.name == "penstock_fallbacks_total"})
    found["tokens"] = sum(int(s.value) for s in samples if s.name == "penstock_gateway_generation_tokens_total")
    return found


def logged(pools: Pools) -> Counter[str]:
    """The same by its log."""
    living = {process.pid for process in pools.services("gateway")}
    events = [event for event in pools.events() if event["pid"] in living]
    found = Counter(f"fallback {event['reason']}" for event in events if event["event"] == "fallback")
    found["tokens"] = sum(event["tokens"] for event in events if event["event"] == "told")
    return found


def tally(pools: Pools, since: int) -> dict[str, int]:
    """What happened instead, for whoever reads of a failure."""
    return dict(Counter(f"{e['event']} {e.get('reason', '')}" for e in pools.events()[since:]))
