"""Two engines that share the work on each sequence answer as one does, and give every block back."""

import pytest
from fake_engine import Bench, expected
from joined_engines import JoinedBenches

from penstock.executor.handoff.ticket import HandoffFailure, Receive
from penstock.executor.sequence import Finish, SequenceRequest


def prompt_of(length, first=0):
    return [(first + 7 * k * k + k) % 97 for k in range(length)]


def at_baseline(*benches):
    return all(b.engine.blocks.counts().used == 0 and b.engine.idle for b in benches)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 32, 200, 700])
@pytest.mark.parametrize("count", [1, 2, 3, 40])
def test_tokens_are_those_of_one_engine(length, count):
    joined = JoinedBenches(Bench(prefill_chunk=64, max_batch_tokens=96))
    prompt = prompt_of(length)
    joined.submit(1, prompt, count)
    assert joined.run() == {1: expected(prompt, count)}
    if count == 1:  # the first token is the last
        assert joined.prefill.finished[1].reason is Finish.LENGTH
        assert joined.decode.finished[1].handoff_failure is HandoffFailure.ABORTED
        assert not joined.arrived
    else:
        assert joined.prefill.finished[1].reason is Finish.HANDED_OFF
        assert joined.decode.finished[1].reason is Finish.LENGTH
        assert 1 in joined.arrived
    assert joined.prefill.started.keys() == {1}
    assert not joined.decode.started
    assert at_baseline(joined.prefill, joined.decode)


def test_kv_leaves_while_prefill_still_runs_and_beside_decodes():
    joined = JoinedBenches(Bench(prefill_chunk=64, max_batch_tokens=96))
    joined.prefill.submit(9, [1], 100)
    joined.prefill.engine.step()
    joined.submit(1, prompt_of(500), 3)
    joined.run()
    assert joined.arrived[1].pushes == -(-500 // 64)
    assert joined.tokens[9] == expected([1], 100)


def test_without_somebody_who_moves_kv_a_handoff_is_refused():
    bench = Bench()
    bench.engine.submit(SequenceRequest(sequence_id=1, prompt=[1], max_tokens=3, handoff=Receive("other")), bench.sink)
    assert bench.finished[1].reason is Finish.REFUSED
    assert "handoff" in bench.finished[1].message
