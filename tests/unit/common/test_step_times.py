import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.step_times import Curve, StepTimes

seconds = st.floats(1e-6, 10)
measured = st.dictionaries(st.integers(1, 4096), seconds, min_size=1, max_size=8)
sizes = st.lists(st.integers(0, 20_000), min_size=2, max_size=20).map(sorted)
slopes = st.floats(0, 1e-3)
times = st.builds(
    StepTimes,
    prefill=measured.map(Curve.through),
    prefill_pair_seconds=slopes,
    decode=measured.map(Curve.through),
    decode_context=st.integers(1, 4096),
    decode_token_seconds=slopes,
)


def never_falls(values):
    return all(a <= b * (1 + 1e-12) for a, b in pairwise(values))


@given(measured, sizes)
def test_curve_never_falls_and_is_exact_at_its_knots(points, asked):
    curve = Curve.through(points)
    assert [curve.at(size) for size in curve.sizes] == list(curve.seconds)
    assert never_falls([curve.at(size) for size in sorted({*asked, *curve.sizes})])


@given(st.dictionaries(st.integers(1, 4096), seconds, min_size=2, max_size=8))
def test_curve_through_times_that_rise_keeps_every_one(points):
    rising = dict(zip(sorted(points), sorted(points.values()), strict=True))
    assert dict(zip(Curve.through(rising).sizes, Curve.through(rising).seconds, strict=True)) == rising


def test_disturbed_measurement_comes_down_to_that_of_a_larger_step():
    assert Curve.through({1: 1.0, 2: 9.0, 4: 2.0}) == Curve((1, 2, 4), (1.0, 2.0, 2.0))


def test_curve_between_and_beyond_its_knots():
    curve = Curve((2, 4, 8), (1.0, 2.0, 3.0))
    assert [curve.at(size) for size in (1, 3, 6, 12)] == [1.0, 1.5, 2.5, 4.0]
    assert Curve((4,), (2.0,)).at(10) == 5.0


@given(times, sizes, sizes)
def test_more_tokens_more_context_and_more_sequences_never_take_less_time(times, first, second):
    for other in second[:4]:
        assert never_falls([times.prefill_seconds(tokens, other) for tokens in first])
        assert never_falls([times.prefill_seconds(other, past) for past in first])
        assert never_falls([times.chunk_seconds(tokens, other) for tokens in first])
        assert never_falls([times.step_seconds(batch, other) for batch in first])
        assert never_falls([times.step_seconds(other, context) for context in first])


@given(times, st.integers(0, 20_000), st.integers(0, 20_000))
def test_prefill_is_the_sum_of_its_chunks(times, tokens, past):
    chunk = times.prefill.sizes[-1]
    steps = [(min(chunk, tokens - done), past + done) for done in range(0, tokens, chunk)]
    assert times.prefill_seconds(tokens, past) == pytest.approx(math.fsum(times.chunk_seconds(*step) for step in steps))


@given(times)
def test_measured_steps_are_told_as_measured(times):
    for size, measured in zip(times.prefill.sizes, times.prefill.seconds, strict=True):
        assert times.chunk_seconds(size) == measured
        assert times.prefill_tokens_per_second >= size / measured
    for size, measured in zip(times.decode.sizes, times.decode.seconds, strict=True):
        assert times.step_seconds(size, times.decode_context) == measured


@pytest.mark.parametrize(
    ("knots", "why"),
    [
        (((), ()), "no curve"),
        (((1, 2), (1.0,)), "no curve"),
        (((2, 2), (1.0, 1.0)), "must rise"),
        (((0, 2), (1.0, 1.0)), "must rise"),
        (((1, 2), (2.0, 1.0)), "never fall"),
        (((1, 2), (0.0, 1.0)), "positive"),
        (((1, 2), (1.0, math.inf)), "finite"),
        (((1, 2, 3), (1.0, math.nan, 3.0)), "never fall"),
        (((1,), (math.nan,)), "positive"),
    ],
)
def test_impossible_curve_is_refused(knots, why):
    with pytest.raises(ValueError, match=why):
        Curve(*knots)


@pytest.mark.parametrize(
    "wrong",
    [{"prefill_pair_seconds": -1.0}, {"decode_token_seconds": math.nan}, {"decode_token_seconds": math.inf}, {"decode_context": 0}],
)
def test_impossible_step_times_are_refused(wrong):
    curve = Curve((1,), (1.0,))
    possible = {"prefill": curve, "prefill_pair_seconds": 0.0, "decode": curve, "decode_context": 1, "decode_token_seconds": 0.0}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        StepTimes(**possible | wrong)
