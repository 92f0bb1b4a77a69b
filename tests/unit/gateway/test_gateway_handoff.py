"""A choice that runs apart: what each half's words do at each stage, and that the client never notices."""

import pytest
from scripted_ports import build

from penstock.common.errors import Cancelled, Unavailable
from penstock.common.handoff import HandoffFailure
from penstock.common.placement import PlacementReason
from penstock.gateway.answer import Fallback, FallbackReason, FinishReason, Handoff
from penstock.gateway.ports import Lease, Loss, PrefillLease, SequenceEnd, SequenceStart, Text, TokenReport
from penstock.gateway.states import Event, Stage, State
from penstock.gateway.table import STAGES

APART = Lease("d0", "host:1", 9, 0.5, PrefillLease("p0", "host:2", 7), PlacementReason.COST)
TOGETHER = Lease("d1", "host:3", reason=PlacementReason.REPLACED)
ARRIVAL = Handoff(1 << 20, 0.25, 0.125, "shared_memory", native=True)


def bring(case, stage):
    """The first choice to a stage of its handoff. Nothing has been told yet."""
    choice = case.request.choices[0]
    case.request.granted(TOGETHER if stage is Stage.TOGETHER else APART)
    if stage in {Stage.SENDING, Stage.ARRIVED}:
        case.request.reserved_blocks(choice, choice.sequence_id, b"ticket")
    if stage is Stage.ABORTED:
        case.request.reserved_blocks(choice, choice.sequence_id, b"ticket")
        case.ports.sequences.pop(choice.sequence_id)
        case.request.handoff_failed(choice, choice.sequence_id, HandoffFailure.ABORTED, "ended")
    if stage is Stage.ARRIVED:
        case.request.token(choice, 5, 0)
        case.request.kv_arrived(choice, choice.sequence_id, ARRIVAL)
    assert choice.stage is stage
    return choice


def send(case, choice, event):
    """An event of a handoff, as the executors' own words where there is a half that could say them."""
    facts = {
        Event.RESERVED: (b"ticket",),
        Event.ARRIVED: (ARRIVAL,),
        Event.HANDED_OFF: (0,),
        Event.HANDOFF_FAILED: (FallbackReason.LEASE_EXPIRED, "quiet"),
        Event.PREFILL_ENDED: (SequenceEnd.STOP, 0),
        Event.PREFILL_LOST: (FallbackReason.PREFILL_LOST, "gone"),
    }
    case.request.apply(event, choice, *facts[event])


SAME, AGAIN, ANEW = "same", "placed again", "started anew"
OUTCOMES = {
    # event: what becomes of the choice at TOGETHER, RESERVING, SENDING (nothing heard yet), ARRIVED (the first token was heard),
    # ABORTED (nothing heard)
    Event.RESERVED: (SAME, Stage.SENDING, SAME, SAME, SAME),
    Event.ARRIVED: (SAME, SAME, Stage.ARRIVED, SAME, SAME),
    Event.HANDED_OFF: (SAME, SAME, ANEW, SAME, ANEW),
    Event.HANDOFF_FAILED: (AGAIN, ANEW, ANEW, ANEW, SAME),
    Event.PREFILL_ENDED: (SAME, SAME, ANEW, "ended", ANEW),
    Event.PREFILL_LOST: (SAME, SAME, ANEW, SAME, ANEW),
}


def test_the_table_of_stages_decides_every_pair():
    assert set(STAGES) == {(stage, event) for stage in Stage for event in OUTCOMES}


@pytest.mark.parametrize("event", OUTCOMES)
@pytest.mark.parametrize("stage", Stage)
def test_each_event_at_each_stage(stage, event):
    case = build()
    choice = bring(case, stage)
    send(case, choice, event)
    outcome = OUTCOMES[event][list(Stage).index(stage)]
    if outcome == AGAIN:
        assert case.request.state is State.QUEUED
    elif outcome == "ended":
        assert case.request.state is State.FLUSHING
    else:
        expected = {SAME: stage, ANEW: Stage.TOGETHER}.get(outcome, outcome)
        assert choice.stage is expected
    fallbacks = {AGAIN: [Fallback.REPLACED], ANEW: [Fallback.RECOMPUTE_ON_DECODE]}.get(outcome, [])
    assert [f for f, _, _ in case.request.record.fallbacks] == fallbacks
    if outcome == ANEW:
        assert len(case.ports.sequences) == 1
        assert case.ports.starts[-1] == ("d0", 0, tuple(choice.ids), "together")
        assert not case.ports.prefilling


def test_an_undisturbed_handoff_is_told_in_the_closing():
    case = build(max_tokens=3)
    request, choice = case.request, case.request.choices[0]
    request.granted(APART)
    decoding = choice.sequence_id
    request.reserved_blocks(choice, decoding, b"ticket")
    prefilling = choice.apart.sequence_id
    assert [start[0] for start in case.ports.starts] == ["d0", "p0"]
    request.sequence_started(choice, prefilling, SequenceStart(2, 0.25, 1.5))
    request.token(choice, 5, 0)
    request.kv_arrived(choice, decoding, ARRIVAL)
    request.sequence_started(choice, decoding, SequenceStart(3, 9.0, 9.0))
    assert case.ports.prefilling
    request.handed_off(choice, prefilling, 0)
    assert not case.ports.prefilling
    request.scheduler_back()
    assert case.ports.announced[-1].prefill is None
    request.token(choice, 6, 1)
    request.token(choice, 7, 2)
    request.sequence_ended(choice, decoding, SequenceEnd.LENGTH, 0)
    request.text(choice, Text("abc", 0, 3, last=True))
    closing = case.told.closing
    assert case.told.ids[0] == [5, 6, 7]
    assert (closing.prefill_executor_id, closing.decode_executor_id, closing.executor_ids) == ("p0", "d0", ("d0", "p0"))
    assert (closing.placement_reason, closing.fallback, closing.fallback_reason) == (PlacementReason.COST, Fallback.NONE, None)
    assert (closing.handoff.kv_bytes, closing.handoff.transport, closing.handoff.native) == (1 << 20, "shared_memory", True)
    assert (closing.cached_tokens, closing.prefill_seconds) == (2, 1.5), "the half that prefilled tells them"
    assert closing.queue_seconds == 0.5 + 1.0 + 0.25, (
        "at the scheduler, for blocks (one tick of the clock), at the prefill executor"
    )
    assert case.ports.at_rest()


def test_a_restarted_scheduler_is_told_of_both_halves():
    case = build()
    bring(case, Stage.SENDING)
    case.request.scheduler_back()
    assert case.ports.announced == [APART]


def test_tokens_and_their_reports_are_ordered_by_position_whichever_half_tells_them_first():
    case = build(max_tokens=4)
    choice = bring(case, Stage.SENDING)
    request, decoding = case.request, choice.sequence_id
    for position in (1, 2, 3):
        request.report(choice, position, TokenReport(position + 5, -1.0, 1, (), ()))
        request.token(choice, position + 5, position)
        request.token(choice, position + 5, position)
    request.sequence_ended(choice, decoding, SequenceEnd.LENGTH, 0)
    assert choice.ids == []
    assert request.state is State.PREFILLING
    assert request.record.first_token_at is None
    request.report(choice, 0, TokenReport(5, -1.0, 1, (), ()))
    request.token(choice, 5, 0)
    assert choice.ids == [5, 6, 7, 8]
    assert [r.token_id for r in choice.reports] == [5, 6, 7, 8]
    assert choice.ended is SequenceEnd.LENGTH
    assert request.state is State.FLUSHING
    assert not case.ports.sequences, "the half that prefills, too, was stopped"


def test_a_prefill_half_that_is_lost_before_its_token_was_heard_costs_what_came_behind_it():
    """The executor that decodes never tells the first token: behind a gap that nobody fills, all is computed again."""
    case = build()
    choice = bring(case, Stage.SENDING)
    request = case.request
    request.kv_arrived(choice, choice.sequence_id, ARRIVAL)
    request.token(choice, 6, 1)
    request.sequence_lost(choice, choice.apart.sequence_id, Loss.LOST, "gone")
    assert case.ports.starts[-1] == ("d0", 0, (), "together")
    assert request.record.fallbacks[-1][:2] == (Fallback.RECOMPUTE_ON_DECODE, FallbackReason.PREFILL_LOST)
    request.token(choice, 5, 0)
    request.token(choice, 6, 1)
    assert choice.ids == [5, 6]


def test_a_gap_behind_early_tokens_is_a_lost_sequence():
    case = build()
    choice = bring(case, Stage.SENDING)
    case.request.token(choice, 6, 1)
    case.request.token(choice, 8, 3)
    assert case.request.state is State.QUEUED
    assert case.ports.placings[-1].avoid == ("d0",)


@pytest.mark.parametrize("loss", Loss)
def test_a_prefill_half_that_is_lost_is_computed_where_the_choice_decodes(loss):
    case = build()
    choice = bring(case, Stage.SENDING)
    request, decoding = case.request, choice.sequence_id
    request.token(choice, 5, 0)
    request.sequence_lost(choice, choice.apart.sequence_id, loss, "gone")
    assert request.record.fallbacks[-1][1].value == f"prefill_{loss.value}"
    assert case.ports.starts[-1] == ("d0", 0, (5,), "together")
    assert choice.sequence_id != decoding
    assert list(case.ports.sequences) == [choice.sequence_id]
    request.sequence_lost(choice, decoding, Loss.FAILED, "late")
    assert request.state is State.DECODING, "the half that was given up is heard no more"


@pytest.mark.parametrize("prefills", [True, False])
@pytest.mark.parametrize("failure", HandoffFailure)
def test_why_a_handoff_failed_is_counted_by_its_name(failure, prefills):
    case = build()
    choice = bring(case, Stage.SENDING)
    decoding, prefilling = choice.sequence_id, choice.apart.sequence_id
    case.request.handoff_failed(choice, prefilling if prefills else decoding, failure, "no")
    if failure is HandoffFailure.ABORTED and not prefills:
        assert not case.request.record.fallbacks, "it was ended by the other half, which will say why"
        case.request.handoff_failed(choice, prefilling, failure, "no")
    assert [reason.value for _, reason, _ in case.request.record.fallbacks] == [failure.value]
    assert case.request.record.prefill_executor_id == "d0"


@pytest.mark.parametrize("loss", Loss)
@pytest.mark.parametrize("stage", [Stage.RESERVING, Stage.SENDING, Stage.ARRIVED])
def test_a_lost_decode_half_is_placed_again_and_both_are_stopped(stage, loss):
    case = build()
    choice = bring(case, stage)
    told = list(choice.ids)
    case.request.sequence_lost(choice, choice.sequence_id, loss, "gone")
    assert not case.ports.sequences
    assert not case.ports.prefilling
    placing = case.ports.placings[-1]
    assert (placing.replacing, placing.avoid, placing.replayed) == (True, ("d0",), len(told))
    assert case.request.record.fallbacks[-1][1].value == f"decode_{loss.value}"
    case.request.granted(APART)
    assert case.ports.starts[-1] == ("d0", 0, tuple(told), "receive"), "it may run apart again, behind what was told"
    assert choice.apart.first == len(told)


def test_after_arrival_trouble_of_the_prefill_half_is_none():
    for trouble in ("failed", "lost"):
        case = build()
        choice = bring(case, Stage.ARRIVED)
        prefilling = choice.apart.sequence_id
        if trouble == "failed":
            case.request.handoff_failed(choice, prefilling, HandoffFailure.ABORTED, "late")
        else:
            case.request.sequence_lost(choice, prefilling, Loss.LOST, "gone")
        assert not case.request.record.fallbacks
        assert list(case.ports.sequences) == [choice.sequence_id]
        assert not case.ports.prefilling
        case.request.token(choice, 6, 1)
        assert choice.ids == [5, 6]


def test_a_first_token_that_is_the_last_ends_the_choice_and_stops_the_half_that_waits():
    case = build()
    choice = bring(case, Stage.SENDING)
    request = case.request
    request.token(choice, case.eos, 0)
    request.sequence_ended(choice, choice.apart.sequence_id, SequenceEnd.STOP, 0)
    assert not case.ports.sequences
    assert not case.ports.placed
    request.text(choice, Text("", 0, 0, last=True))
    assert case.told.finishes[0].reason is FinishReason.STOP
    assert case.told.closing.fallback is Fallback.NONE
    assert case.told.closing.handoff is None


@pytest.mark.parametrize("heard", [True, False])
def test_a_handoff_that_is_aborted_for_the_last_token_is_no_trouble(heard):
    """The executor that decodes hears of the end from the other one, and may tell of it first."""
    case = build()
    choice = bring(case, Stage.SENDING)
    decoding, prefilling = choice.sequence_id, choice.apart.sequence_id
    if heard:
        case.request.token(choice, case.eos, 0)
    case.request.handoff_failed(choice, decoding, HandoffFailure.ABORTED, "ended")
    if not heard:
        case.request.token(choice, case.eos, 0)
        case.request.sequence_ended(choice, prefilling, SequenceEnd.STOP, 0)
    assert choice.ended is SequenceEnd.STOP
    assert not case.request.record.fallbacks
    assert not case.ports.placed


def test_only_the_first_choice_runs_apart():
    case = build(n=3)
    request = case.request
    request.granted(APART)
    assert case.ports.starts == [("d0", 0, (), "receive"), ("d0", 1, (), "together"), ("d0", 2, (), "together")]
    request.reserved_blocks(request.choices[0], request.choices[0].sequence_id, b"ticket")
    for choice in request.choices:
        request.token(choice, 5, 0)
    request.sequence_lost(request.choices[0], request.choices[0].apart.sequence_id, Loss.REFUSED, "full")
    assert case.ports.starts[-1] == ("d0", 0, (5,), "together")
    assert len(case.ports.sequences) == 3
    assert [f.value for _, f, _ in request.record.fallbacks] == ["prefill_refused"]


def test_a_finished_first_choice_leaves_the_handoff_to_the_next():
    case = build(n=2)
    request = case.request
    request.granted(TOGETHER)
    for choice in request.choices:
        request.token(choice, 5, 0)
    request.sequence_ended(request.choices[0], request.choices[0].sequence_id, SequenceEnd.LENGTH, 0)
    request.sequence_lost(request.choices[1], request.choices[1].sequence_id, Loss.LOST, "gone")
    request.granted(APART)
    assert case.ports.starts[-1] == ("d0", 1, (5,), "receive")


@pytest.mark.parametrize("stage", [Stage.RESERVING, Stage.SENDING, Stage.ARRIVED])
@pytest.mark.parametrize("end", ["cancel", "break_off", "deadline"])
def test_every_end_frees_both_halves(stage, end):
    case = build(n=2)
    bring(case, stage)
    if end == "cancel":
        case.request.cancel(Cancelled("gone"))
    elif end == "break_off":
        case.request.break_off(Unavailable("leaving"))
    else:
        case.request.deadline()
    assert case.ports.at_rest()
    assert len(case.done) == 1


def test_a_tokenizer_that_is_back_decodes_what_was_told_by_both_halves():
    case = build()
    choice = bring(case, Stage.ARRIVED)
    case.request.token(choice, 6, 1)
    case.ports.decodings.clear()
    case.request.tokenizer_back(choice)
    assert case.ports.decodings[choice.decoding_id] == [5, 6]
    case.request.token(choice, 7, 2)
    assert case.ports.decodings[choice.decoding_id] == [5, 6, 7]
