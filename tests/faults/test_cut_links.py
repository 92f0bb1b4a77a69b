"""Links between hosts that go silent amid a handoff: what was under way is decided within two leases, and nothing is left behind.

Each service's host is a network namespace; a link is cut by dropping packets, so nobody is told of it.
"""

import pytest
from history import Fault, check
from hosts import Hosts
from namespaces import why_not
from pools import BOUND, PROMPTS, Clients, Fails
from suite import wait_for
from trials import settled

from penstock.common.faults import Action

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "network namespaces can be had")

HERE = "the scheduler's host"
LINKS = [("prefill", "decode"), ("prefill", HERE), ("decode", HERE), ("gateway", "prefill"), ("gateway", "decode")]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    hosts = Hosts(tmp_path_factory.mktemp("hosts"), "prefill", "decode")
    try:
        assert wait_for(lambda: hosts.whole(1, 1), 60), hosts.log[-20:]
        yield hosts
    finally:
        status = hosts.stop()
    assert status == 0


@pytest.fixture(scope="module")
def clients(hosts):
    return Clients(hosts.grpc, PROMPTS, 24)


def runs_apart(hosts, clients):
    clients.ask(0)
    placed = [event for event in hosts.events() if event["event"] == "placed"]
    return placed[-1]["prefill_executor_id"]


@pytest.mark.parametrize(("one", "other"), LINKS)
def test_a_link_is_cut_amid_a_handoff(hosts, clients, one, other):
    assert wait_for(lambda: hosts.whole(1, 1), 60), hosts.log[-20:]
    assert wait_for(lambda: runs_apart(hosts, clients), 60)  # a pair that has just failed is left alone for a while
    hosts.assert_idle()
    assert wait_for(lambda: settled(hosts))
    before, since = hosts.held(), len(hosts.events())
    faults = []

    def cut() -> None:
        fault = wait_for(lambda: hosts.fired(rule), 20)
        hosts.network.cut(one, other)  # HERE is no host of the network: the tests' own is meant
        faults.append(Fault(fault.time, f"the link between {one} and {other} was cut"))
        hosts.let_go_on()

    (rule,) = hosts.arm(Fails("handoff.push.sent", Action.STOP, nth=2))
    answers = clients.ask_all(4, meanwhile=cut)
    hosts.network.heal(one)
    hosts.disarm()
    assert wait_for(lambda: hosts.whole(1, 1), 60), hosts.log[-20:]
    hosts.assert_back_to(before, 60)
    assert wait_for(lambda: settled(hosts))
    assert check(hosts.events()[since:], answers, faults, BOUND) == [], hosts.log[-40:]
