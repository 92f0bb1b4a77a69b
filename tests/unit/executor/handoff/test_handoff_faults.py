"""Two sides of a handoff, joined by a network that loses, doubles, delays, corrupts and cuts."""

import asyncio

from handoff_net import DECODE, LATENCY, PREFILL, Net, Stream, run
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.words import Commit, Push, Refusal

LEASE = 3.0
FAULTS = st.one_of(
    st.none(), st.sampled_from(["drop", "double", "corrupt", "cut"]), st.tuples(st.just("late"), st.sampled_from([0.3, 1.1, 4.0]))
)


async def hand_over(net, tokens, cached, steps, *, ended=None):
    loop = asyncio.get_running_loop()
    receiver, ticket = net.reserve(tokens, cached)
    await asyncio.sleep(0)
    sender = net.begin(ticket)
    computing = asyncio.create_task(net.compute(sender, steps, 7))
    if ended is not None:
        side, after = ended
        await asyncio.sleep(after)
        net.end(*((net.prefill, sender) if side == "prefill" else (net.decode, receiver)))
    await computing
    drawn = loop.time()
    # Faults go on as long as there are messages; two leases count from the last of them.
    while not (receiver.ends and sender.ends):
        assert loop.time() <= max(drawn, net.last_fault) + 2 * LEASE + 20 * LATENCY, (receiver.ends, sender.ends)
        await asyncio.sleep(0.05)
    return receiver, sender


def check(net, receiver, sender):
    """Each side has ended once, and the two agree."""
    assert len(receiver.ends) == len(sender.ends) == 1
    decoded, handed = receiver.ends[0][0] == "decodes", sender.ends[0][0] == "handed off"
    assert decoded or not handed  # never given up here and taken up nowhere
    assert all(count == 1 for count in receiver.imported.values())
    if decoded:
        assert receiver.ends[0][1] == 7
        assert receiver.imported.keys() == set(range(receiver.cached, receiver.tokens))


async def forgotten(net):
    """Nothing is left behind a few leases later: no handoff, no copy, no room."""
    await asyncio.sleep(4 * LEASE)
    assert not net.decode.receiving._receivers
    assert not net.decode.receiving._by_handle
    assert not net.prefill.sending._by_handle
    assert not net.prefill.sending._lines
    assert net.engines.prefill.copies == net.engines.decode.copies == 0
    assert net.prefill.counts.sending == net.decode.counts.receiving == 0
    assert sum(net.prefill.counts.sent.values()) == sum(net.decode.counts.received.values()) == 1


@given(
    st.lists(FAULTS, max_size=60),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(1, 4),
    st.none() | st.tuples(st.sampled_from(["prefill", "decode"]), st.sampled_from([0.0, 0.06, 0.09, 0.2])),
)
@example([None] * 5 + ["drop"], 12, 0, 1, None)
@example(["cut"] * 60, 12, 0, 1, None)
@example(["drop"] * 60, 12, 0, 1, None)
@settings(max_examples=100, deadline=None)
def test_whatever_happens_to_messages_both_sides_end_once_and_agree(faults, tokens, cached_blocks, steps, ended):
    async def work():
        net = Net(faults)
        receiver, sender = await hand_over(net, tokens, min(tokens, 4 * cached_blocks), steps, ended=ended)
        check(net, receiver, sender)
        await forgotten(net)

    run(work())


@given(st.lists(FAULTS, max_size=25), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_faults_that_end_are_overcome(faults, tokens):
    """What costs less than a lease costs no handoff."""
    faults = [*[fault for fault in faults if fault in {None, "double", "corrupt"}][:3], "cut"]

    async def work():
        net = Net(faults)
        receiver, sender = await hand_over(net, tokens, 0, 2)
        check(net, receiver, sender)
        assert (receiver.ends[0][0], sender.ends[0][0]) == ("decodes", "handed off")
        await forgotten(net)

    run(work())


def test_many_handoffs_share_a_link_whose_window_holds_a_few_pushes():
    async def work():
        net = Net()
        pairs = []
        for _ in range(12):
            receiver, ticket = net.reserve(64)
            await asyncio.sleep(0)
            pairs.append((receiver, net.begin(ticket)))
        await asyncio.gather(*(net.compute(sender, 4, 7) for _, sender in pairs))
        now = asyncio.get_running_loop().time()
        await net.settle(*(handle for pair in pairs for handle in pair), until=now + 2 * LEASE)
        for receiver, sender in pairs:
            check(net, receiver, sender)
            assert sender.ends[0][0] == "handed off"
        (stream,) = net.streams
        assert stream.outgoing.out == 0
        # In turns: nobody's last push comes before everybody's first.
        order = [word.handoff_id for word in net.words if isinstance(word, Push)]
        assert set(order[: 2 * len(pairs)]) == {handle.request.handoff.ticket.handoff_id for _, handle in pairs}

    run(work())


def test_kv_goes_while_prefill_still_computes():
    async def work():
        net = Net()
        receiver, ticket = net.reserve(64)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        await asyncio.sleep(0.5)
        net.prefill.computed(sender, 30)
        await asyncio.sleep(0.5)
        assert receiver.imported.keys() == set(range(28))  # whole blocks
        net.prefill.drawn(sender, 7)
        await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 1)
        check(net, receiver, sender)

    run(work())


def test_a_peer_that_never_comes_costs_a_lease():
    async def work():
        net = Net()
        net.reachable.clear()
        receiver, ticket = net.reserve(8)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        began = asyncio.get_running_loop().time()
        await net.settle(receiver, sender, until=began + LEASE + 0.1)
        assert receiver.ends[0][:2] == ("failed", HandoffFailure.LEASE_EXPIRED)
        assert sender.ends[0][:2] == ("failed", HandoffFailure.UNKNOWN_PEER)
        assert failing(net.prefill) == [(DECODE, True, 1)]
        assert failing(net.decode) == [(PREFILL, False, 1)]
        net.reachable.set()
        await forgotten(net)
        receiver, ticket = net.reserve(8)
        sender = net.begin(ticket)
        await net.compute(sender, 1, 7)
        await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 1)
        assert failing(net.prefill) == failing(net.decode) == []

    run(work())


def failing(side):
    """What the scheduler is told of other executors."""
    peers = side.counts.failing.lately(asyncio.get_running_loop().time())
    return [(peer.executor_id, peer.sends, peer.failures) for peer in peers]


def test_a_failure_of_a_sequence_alone_tells_nothing_of_the_pair():
    async def work():
        net = Net()
        net.engines.decode.fails["import"] = RuntimeError("no memory")
        receiver, _ = await hand_over(net, 8, 0, 1)
        assert receiver.ends[0][:2] == ("failed", HandoffFailure.BACKEND)
        assert failing(net.prefill) == failing(net.decode) == []

    run(work())


def test_an_old_failure_is_told_no_more():
    async def work():
        net = Net()
        net.reachable.clear()
        receiver, _ = net.reserve(8)
        await net.settle(receiver, until=asyncio.get_running_loop().time() + LEASE + 0.1)
        assert failing(net.decode)
        await asyncio.sleep(120)
        assert not failing(net.decode)

    run(work())


def test_a_sequence_that_waits_long_for_its_prefill_is_held_all_the_while():
    async def work():
        net = Net()
        receiver, ticket = net.reserve(8)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        await asyncio.sleep(10 * LEASE)
        await net.compute(sender, 1, 7)
        await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 1)
        assert receiver.ends[0][0] == "decodes"

    run(work())


def test_an_engine_amid_a_long_step_costs_its_time_and_no_handoff():
    async def work():
        net = Net()
        net.engines.decode.lag = 5 * LEASE
        receiver, ticket = net.reserve(40)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        await net.compute(sender, 2, 7)
        await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 60 * LEASE)
        check(net, receiver, sender)
        assert sender.ends[0][0] == "handed off"

    run(work())


def test_a_backend_that_can_not_read_or_write_ends_both_sides():
    async def work(what):
        net = Net()
        engine = net.engines.prefill if what == "export" else net.engines.decode
        engine.fails[what] = ValueError("no such block")
        receiver, sender = await hand_over(net, 8, 0, 1)
        own, other = (sender, receiver) if what == "export" else (receiver, sender)
        assert own.ends[0][:2] == ("failed", HandoffFailure.BACKEND)
        assert other.ends[0][:2] == ("failed", HandoffFailure.ABORTED)
        await forgotten(net)

    for what in ("export", "import"):
        run(work(what))


def test_an_ended_handoff_answers_late_messages_as_before_and_counts_nothing():
    async def work():
        net = Net(["double"] * 40)
        receiver, sender = await hand_over(net, 20, 0, 2)
        check(net, receiver, sender)
        assert net.decode.counts.received == {"done": 1}
        await asyncio.sleep(0.1)
        commit = next(word for word in net.words if isinstance(word, Commit))
        before = len(net.words)
        net.decode.receiving.hear(net.streams[-1], commit)
        assert not net.decode.counts.refusals.keys() - {Refusal.UNKNOWN, Refusal.STALE_EPOCH}
        assert len(net.words) > before

    run(work())


def test_an_end_before_the_stream_is_there_is_told_over_it():
    async def work():
        net = Net(["cut"])
        receiver, ticket = net.reserve(8)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        net.end(net.prefill, sender)
        await net.settle(receiver, until=asyncio.get_running_loop().time() + LEASE)
        assert receiver.ends == [("left",)]
        assert net.decode.counts.received == {"ended": 1}
        await forgotten(net)

    run(work())


def test_a_stream_that_tells_nothing_is_given_up_for_another_before_the_lease_ends():
    async def work():
        net = Net(["drop"] * 3)  # the Reserve, what is said again when no answer comes, and the Renew
        receiver, sender = await hand_over(net, 8, 0, 1)
        check(net, receiver, sender)
        assert sender.ends[0][0] == "handed off"
        assert len(net.streams) == 2

    run(work())


def test_a_commit_whose_kv_is_lost_before_it_is_checked_ends_with_the_lease(monkeypatch):
    """Also where the lease's alarm rang while nothing of the other side was awaited."""

    async def open_slowly(stream, payload, expected):
        await asyncio.sleep(0.5)
        return memoryview(payload.data)

    async def work():
        monkeypatch.setattr(Stream, "open", open_slowly)
        net, loop = Net(), asyncio.get_running_loop()
        began = loop.time()
        receiver, ticket = net.reserve(8)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        await asyncio.sleep(LEASE - 0.1)
        net.prefill.drawn(sender, 7)
        await asyncio.sleep(began + LEASE + 0.01 - loop.time())
        assert any(isinstance(word, Commit) for word in net.words)
        assert not receiver.imported  # the commit waits for checks
        net.reachable.clear()
        net.streams[-1].broken.set()
        await net.settle(receiver, sender, until=loop.time() + 2 * LEASE)
        assert receiver.ends[0][:2] == ("failed", HandoffFailure.LEASE_EXPIRED)
        await forgotten(net)

    run(work())


def test_a_copy_that_is_dropped_before_its_turn_is_not_made():
    async def work():
        net = Net()
        net.engines.prefill.lag = 1.0
        receiver, ticket = net.reserve(8)
        await asyncio.sleep(0)
        sender = net.begin(ticket)
        await asyncio.sleep(0.2)
        net.prefill.drawn(sender, 7)
        await asyncio.sleep(0.1)
        assert net.engines.prefill.copies
        net.streams[-1].broken.set()
        await net.settle(receiver, sender, until=asyncio.get_running_loop().time() + 2 * LEASE)
        assert sender.ends[0][0] == "handed off"
        assert net.engines.prefill.exported == dict.fromkeys(range(8), 1)

    run(work())
