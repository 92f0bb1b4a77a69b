"""The cost of running together and apart: which way each circumstance moves a request, whatever the executors' speeds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.step_times import Curve, StepTimes
from penstock.scheduler.splitting import COUNTED, Decoding, Pace, apart, link_seconds, splits, together


def step_times(overhead, token, pair, step):
    """What steps take whose time is an overhead, so much for each token, and so much for each pair of tokens."""
    sizes = (16, 64, 256, 512)
    return StepTimes(
        prefill=Curve(sizes, tuple(overhead + token * n + pair * n * n / 2 for n in sizes)),
        prefill_pair_seconds=pair,
        decode=Curve((1, 8, 64), (step, 1.5 * step, 4 * step)),
        decode_context=256,
        decode_token_seconds=pair,
    )


def small(least, most):
    return st.floats(least, most, allow_nan=False)


PACES = st.just(COUNTED) | st.builds(
    Pace.of,
    st.builds(step_times, small(1e-4, 1e-1), small(1e-6, 1e-2), small(0, 1e-7), small(1e-4, 1e-1)),
    st.sampled_from([0, 64, 300]),
)
SIDES = st.builds(
    Decoding,
    PACES,
    ahead=st.integers(0, 50_000),
    running=st.integers(0, 64),
    step=small(0, 1),
    answer=small(0, 100),
    cached=st.integers(0, 4000),
)
LINKS = small(1e-9, 1e-2)
SECONDS = small(0, 60)
LEFT = st.none() | SECONDS


def split(prompt, decoding, prefilling, link, left=None):
    return splits(together(prompt, decoding), apart(prompt, prefilling, decoding, link), left)


@given(st.integers(2, 4000), SIDES, SECONDS, LINKS, LEFT, st.data())
def test_more_cached_tokens_never_move_a_request_apart(prompt, decoding, prefilling, link, left, data):
    less, more = sorted(data.draw(st.tuples(*[st.integers(0, prompt - 1)] * 2)))
    if split(prompt, replace(decoding, cached=more), prefilling, link, left):
        assert split(prompt, replace(decoding, cached=less), prefilling, link, left)


@given(st.integers(1, 4000), SIDES, SECONDS, st.tuples(LINKS, LINKS), LEFT)
def test_slower_link_never_moves_a_request_apart(prompt, decoding, prefilling, links, left):
    decoding = replace(decoding, cached=min(decoding.cached, prompt - 1))
    quick, slow = sorted(links)
    if split(prompt, decoding, prefilling, slow, left):
        assert split(prompt, decoding, prefilling, quick, left)


@given(st.integers(1, 4000), SIDES, st.tuples(SECONDS, SECONDS), LINKS)
def test_longer_prefill_elsewhere_never_moves_a_request_apart(prompt, decoding, prefillings, link):
    decoding = replace(decoding, cached=min(decoding.cached, prompt - 1))
    quick, slow = sorted(prefillings)
    if split(prompt, decoding, slow, link):
        assert split(prompt, decoding, quick, link)


@given(st.integers(1, 4000), SIDES, SECONDS, LINKS, st.integers(0, 50_000))
def test_longer_queue_where_it_decodes_never_moves_a_request_together(prompt, decoding, prefilling, link, more):
    decoding = replace(decoding, cached=min(decoding.cached, prompt - 1))
    if split(prompt, decoding, prefilling, link):
        assert split(prompt, replace(decoding, ahead=decoding.ahead + more), prefilling, link)


@given(st.integers(1, 4000), SIDES, SECONDS, LINKS, SECONDS)
def test_way_that_misses_the_deadline_alone_is_not_taken(prompt, decoding, prefilling, link, left):
    decoding = replace(decoding, cached=min(decoding.cached, prompt - 1))
    whole, parted = together(prompt, decoding), apart(prompt, prefilling, decoding, link)
    if whole.first_token <= left < parted.first_token:
        assert not splits(whole, parted, left)
    if parted.first_token <= left < whole.first_token:
        assert splits(whole, parted, left)


@given(st.integers(1, 4000), PACES, LINKS)
def test_idle_executor_prefills_for_itself_what_another_prefills_no_quicker(prompt, pace, link):
    assert not split(prompt, Decoding(pace, 0, 0, 0.0, 1.0, 0), pace.prefill(prompt, 0), link)


def test_long_prompt_leaves_an_executor_that_others_decode_on_and_a_short_one_stays():
    pace = Pace.of(step_times(5e-3, 1e-3, 1e-8, 2e-2), 64)
    link = link_seconds(100_000, 1e9)

    def prompt_of(tokens, running):
        return split(tokens, Decoding(pace, 0, running, pace.step(running, 500.0), 1.0, 0), pace.prefill(tokens, 0), link)

    assert prompt_of(2000, 8)
    assert not prompt_of(2000, 0)
    assert not prompt_of(2, 8)


def test_waiting_that_is_expected_is_what_each_step_takes():
    times = StepTimes(
        prefill=Curve((100,), (1.0,)),
        prefill_pair_seconds=1e-5,
        decode=Curve((1, 2), (0.1, 0.2)),
        decode_context=50,
        decode_token_seconds=1e-3,
    )
    pace = Pace.of(times, 50)
    step = 0.1 + 0.01
    assert pace.step(1, 60.0) == pytest.approx(step)
    here = Decoding(pace, ahead=100, running=1, step=step, answer=5.0, cached=100)
    own = 200 * 0.01 + 1e-5 * (100 * 100 + 100 * 200)
    whole = together(300, here)
    assert whole.first_token == pytest.approx(1.0 + own + 6 * step)
    assert whole.cost == pytest.approx(whole.first_token + 2 * own + 5.0)
    parted = apart(300, 4.0, here, link_seconds(1000, 1e6))
    assert parted.first_token == pytest.approx(4.0 + step, abs=0.01)
    assert parted.cost == pytest.approx(parted.first_token + 0.1 + 2 * 0.201 + 5.0)
    slow = apart(300, 0.5, here, link_seconds(5000, 1e6))
    assert slow.cost == pytest.approx(slow.first_token + (1.0 - 0.5) + 2 * 1.001 + 5.0)


def test_link_that_is_slower_than_prefill_is_not_used():
    pace = Pace.of(step_times(5e-3, 1e-3, 0.0, 2e-2), 64)
    crowded = Decoding(pace, 100_000, 50, 0.1, 1.0, 0)
    assert split(1000, crowded, 0.1, 0.9e-3)
    assert not split(1000, crowded, 0.1, 1.1e-3)
