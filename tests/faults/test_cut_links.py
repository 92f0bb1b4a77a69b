"""Links between hosts that go silent amid a handoff: what was under way is decided within two leases, and nothing is left behind.

Each service's host is a network namespace; a link is cut by dropping packets, so nobody is told of it.
"""

import pytest
from history import Fault, check
from hosts import Hosts
from namespaces import why_not
from pools import BOUND, PROMPTS, Clients, Fails
from suite import wait_for
from trials import hands_over_again, settled, tally

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


@pytest.mark.parametrize(("one", "other"), LINKS)
def test_a_link_is_cut_amid_a_handoff(hosts, clients, one, other):
    assert wait_for(lambda: hosts.whole(1, 1), 60), hosts.log[-20:]
    assert wait_for(lambda: hands_over_again(hosts, clients), 60), hosts.log[-20:]
    hosts.assert_idle()
    before, since = hosts.held(), len(hosts.events())
    (rule,) = hosts.arm(Fails("handoff.push.sent", Action.STOP, nth=2))
    faults = []

    def cut() -> None:
        try:
            assert wait_for(lambda: hosts.fired(rule), 60), (tally(hosts, since), hosts.log[-20:])
            hosts.network.cut(one, other)  # HERE is no host of the network: the tests' own is meant
            faults.append(Fault(hosts.fired(rule).time, f"the link between {one} and {other} was cut"))
        finally:
            hosts.disarm()
            hosts.let_go_on()

    try:
        answers = clients.ask_all(4, meanwhile=cut)
    finally:
        hosts.network.heal(one)
    assert wait_for(lambda: hosts.whole(1, 1), 60), hosts.log[-20:]
    hosts.assert_back_to(before, 60)
    assert wait_for(lambda: settled(hosts))
    assert check(hosts.events()[since:], answers, faults, BOUND) == [], hosts.log[-40:]
