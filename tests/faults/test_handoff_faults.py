"""Prefill and decode apart, and everything that can fail between them, in a suite of real processes.

Each case has something fail at a named point, and proves by the event log that every request was answered with the very tokens of an
undisturbed run, or told why not, within two leases; that no token was lost or doubled; and that every block, descriptor, segment and
task came back. `make faults` runs every pair one by one; without it, messages fail together and a process at one point each.
"""

import pytest
from pools import PROMPTS, Clients, Fails, Pools
from trials import Trial

from penstock.common.faults import Action

OF_MESSAGES = (Action.LOSE, Action.DOUBLE, Action.LATE, Action.CORRUPT, Action.STALE, Action.CUT)
OF_PROCESSES = (Action.KILL, Action.STOP)
# Messages of every handoff, each with the one that fails: they hit different handoffs, some of them the same one.
USUAL = {"reserve": 1, "push": 6, "commit": 2, "release": 3, "reserved": 2, "pushed": 9, "ack": 4}

# Where a process passes that prefills, decodes, and so on. Points of rarer messages have their own cases.
PREFILL = (
    *("executor.send", "handoff.introduce", "handoff.attach", "executor.drawn"),
    *(f"handoff.{message}.sent" for message in ("reserve", "push", "commit", "release")),
    *(f"handoff.{message}.received" for message in ("reserved", "pushed", "ack")),
)
DECODE = (
    *("executor.receive", "executor.reserved", "handoff.welcome"),
    *(f"handoff.{message}.received" for message in ("reserve", "push", "commit", "release")),
    *(f"handoff.{message}.sent" for message in ("reserved", "pushed", "ack")),
)
GATEWAY = ("accepted", "placed", "reserved", "token", "arrived", "handed_off")
SCHEDULER = ("asked", "granted", "prefilled")
POINTS = (*PREFILL, *DECODE, *(f"gateway.{point}" for point in GATEWAY), *(f"scheduler.{point}" for point in SCHEDULER))
# Passed once by a stream, which is open already unless it breaks first.
OF_STREAMS = ("handoff.introduce", "handoff.attach", "handoff.welcome")
# Passed once by a message, which may ask for all requests.
OF_MANY = ("scheduler.asked", "scheduler.prefilled")


def name(value):
    return value.value if isinstance(value, Action) else value


@pytest.fixture(scope="module")
def trial(tmp_path_factory):
    with Pools(tmp_path_factory.mktemp("pools")) as pools:
        trial = Trial(pools, Clients(pools.grpc, PROMPTS, 24))
        yield trial
        assert pools.stop() == 0


def at(point, action):
    """The fault, and what has to fail before it so that its point is passed at all."""
    before = [Fails("handoff.reserve.sent", Action.CUT)] if point in OF_STREAMS else []
    return [*before, Fails(point, action, nth=1 if point in (*OF_STREAMS, *OF_MANY) else 2)]


def test_undisturbed(trial):
    trial.run(requests=[8])


@pytest.mark.parametrize("action", OF_MESSAGES, ids=name)
def test_messages(trial, action):
    trial.run(*(Fails(f"handoff.{message}.sent", action, nth, 0.5) for message, nth in USUAL.items()), requests=[10])


@pytest.mark.parametrize("point", ["handoff.push.sent", "handoff.ack.sent", "gateway.arrived", "scheduler.prefilled"])
def test_a_process_is_killed(trial, point):
    trial.run(*at(point, Action.KILL))


def test_an_executor_stands_still(trial):
    trial.run(Fails("handoff.commit.sent", Action.STOP))


@pytest.mark.matrix
@pytest.mark.parametrize("action", OF_MESSAGES, ids=name)
@pytest.mark.parametrize("where", ["sent", "received"])
@pytest.mark.parametrize("message", USUAL)
def test_each_message(trial, message, where, action):
    trial.run(Fails(f"handoff.{message}.{where}", action, 2, 0.5))


@pytest.mark.matrix
@pytest.mark.parametrize("action", OF_MESSAGES, ids=name)
@pytest.mark.parametrize("where", ["sent", "received"])
@pytest.mark.parametrize("message", ["renew", "renewed", "abort", "aborted", "refused"])
def test_each_rarer_message(trial, message, where, action):
    if message in {"renew", "renewed"}:  # said by those that wait long for their turn
        trial.run(Fails(f"handoff.{message}.{where}", action, 1, 0.5), requests=[80, 160, 320])
    elif message == "refused":
        trial.run(Fails("handoff.push.sent", Action.CORRUPT), Fails(f"handoff.{message}.{where}", action, 1, 0.5))
    else:
        trial.run(Fails(f"handoff.{message}.{where}", action, 1, 0.5), requests=[2], leaving=16)


@pytest.mark.matrix
@pytest.mark.parametrize("action", OF_PROCESSES, ids=name)
@pytest.mark.parametrize("point", POINTS)
def test_each_point(trial, point, action):
    trial.run(*at(point, action))
