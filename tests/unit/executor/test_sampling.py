"""The sampler against straightforward references: transformers' warpers, sorting, and torch's softmax."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from penstock.executor.sampling import Adjustment, NotFinite, Row, Sampler, SamplingParameters
from penstock.executor.sampling.draw import Drawer
from penstock.executor.sampling.likeliest import at_least_kth, top
from penstock.executor.sampling.random import uniform

SIZE = 3000


def normal_logits(deviation, size=SIZE, seed=0):
    return np.random.default_rng(seed).normal(0, deviation, size).astype(np.float32)


def probabilities(logits, parameters):
    """What transformers' warpers leave, as a distribution."""
    scores = torch.from_numpy(logits.copy())[None]
    warpers = [TemperatureLogitsWarper(parameters.temperature)]
    if parameters.top_k:
        warpers.append(TopKLogitsWarper(parameters.top_k))
    if parameters.top_p < 1:
        warpers.append(TopPLogitsWarper(parameters.top_p))
    if parameters.min_p:
        warpers.append(MinPLogitsWarper(parameters.min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)[0].double().numpy()


PARAMETERS = [
    SamplingParameters(temperature=0.8, top_p=0.95),
    SamplingParameters(temperature=1.5, top_p=0.3),
    SamplingParameters(temperature=1.0),
    SamplingParameters(temperature=0.6, top_k=20, top_p=0.95),
    SamplingParameters(temperature=0.6, top_k=500, top_p=0.5, min_p=0.01),
    SamplingParameters(temperature=1.0, top_p=0.9, min_p=0.02),
    SamplingParameters(temperature=1.0, top_k=1),
]


@pytest.mark.parametrize("deviation", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("parameters", PARAMETERS, ids=repr)
def test_draws_are_distributed_as_transformers_would(parameters, deviation):
    logits = normal_logits(deviation)
    expected = probabilities(logits, parameters)
    drawer, draws = Drawer(SIZE), 4000
    counts = np.bincount([drawer.draw(logits, parameters, position) for position in range(draws)], minlength=SIZE)
    # A token at the border of top_p may fall on either side, since the sums are rounded differently.
    assert counts[expected == 0].sum() <= draws * 5e-3
    # Tokens in groups of at least ten expected draws, likeliest first; the bound is the chi-square distribution's, far out.
    order = np.argsort(-expected, kind="stable")
    order = order[expected[order] > 0]
    group = (np.cumsum(expected[order]) * draws / 10).astype(int)
    wanted = np.bincount(group, expected[order] * draws)
    seen = np.bincount(group, counts[order])
    wanted, seen = wanted[wanted > 5], seen[wanted > 5]
    freedom = max(1, len(wanted) - 1)
    assert ((seen - wanted) ** 2 / wanted).sum() < freedom + 5 * np.sqrt(2 * freedom) + 5


@pytest.mark.parametrize("parameters", PARAMETERS, ids=repr)
def test_the_kept_set_is_transformers(parameters):
    logits = normal_logits(4.0, 200, seed=3)
    expected = probabilities(logits, parameters)
    drawer = Drawer(200)
    drawn = {drawer.draw(logits, parameters, position) for position in range(3000)}
    kept = set(np.flatnonzero(expected).tolist())
    assert drawn <= kept
    assert {token for token in kept if expected[token] > 0.005} <= drawn


def test_of_equally_likely_tokens_the_lower_ids_are_kept():
    logits = np.zeros(5000, np.float32)
    drawer = Drawer(5000)
    drawn = {drawer.draw(logits, SamplingParameters(top_p=0.01), position) for position in range(2000)}
    assert drawn == set(range(50))


def test_a_tiny_top_p_keeps_the_likeliest_alone():
    logits = normal_logits(0.1, 100_000)
    drawer = Drawer(100_000)
    assert {drawer.draw(logits, SamplingParameters(top_p=1e-6), i) for i in range(20)} == {int(logits.argmax())}


def test_impossible_tokens_are_never_drawn():
    logits = np.full(2048, -np.inf, np.float32)
    logits[[5, 2047]] = 1.0
    drawer = Drawer(2048)
    assert {drawer.draw(logits, SamplingParameters(temperature=2.0), i) for i in range(50)} == {5, 2047}


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 100))
def test_random_numbers_are_below_one(seed, position, attempt):
    assert 0 <= uniform(seed, position, attempt) < 1


def test_random_numbers_of_neighbouring_counters_are_uniform_and_unrelated():
    numbers = np.array([[uniform(seed, position, 0) for position in range(200)] for seed in range(200)])
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 19 + 5 * np.sqrt(38)
    for one, other in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


@given(st.integers(1, 2000), st.integers(0, 100), st.sampled_from([0.0, 1.0]))
def test_the_k_likeliest_are_those_of_a_sort(k, seed, step):
    logits = normal_logits(1.0, 1700, seed)
    if step:
        logits = np.round(logits * 4) / 4  # with many ties
    kth = np.sort(logits)[::-1][min(k, len(logits)) - 1]
    assert at_least_kth(logits, k).tolist() == np.flatnonzero(logits >= kth).tolist()
    assert top(logits, k).tolist() == np.argsort(-logits, kind="stable")[:k].tolist()


def test_a_row_gives_the_same_token_whatever_runs_beside_it():
    rows = [normal_logits(0.5, seed=i) for i in range(12)]
    parameters = [
        SamplingParameters(temperature=0.9, top_p=0.9, seed=i) if i % 3 else SamplingParameters(temperature=0) for i in range(12)
    ]
    together = Sampler(SIZE).sample(np.stack(rows), [Row(p, 7) for p in parameters])
    alone = [Sampler(SIZE).sample(row[None].copy(), [Row(p, 7)])[0] for row, p in zip(rows, parameters, strict=True)]
    assert together == alone


def test_penalties_are_those_of_the_formula():
    logits = normal_logits(2.0, 50)
    p = SamplingParameters(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3, logit_bias={9: 2.0})
    prompt, output = [1, 2, 2, 3], [3, 4, 4, 4]
    expected = logits.copy()
    expected[9] += 2.0
    scores = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt + output]), torch.from_numpy(expected)[None])
    expected = scores[0].numpy()
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    expected[[7, 8]] = -np.inf
    adjusted = Adjustment(p, prompt, output[:1])
    for token in output[1:]:
        adjusted.count(token)
    adjusted.apply(logits, [7, 8])
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_many_seen_tokens_keep_their_counts():
    p = SamplingParameters(frequency_penalty=1.0)
    adjustment = Adjustment(p, (), ())
    output = [i % 700 for i in range(1500)]
    for token in output:
        adjustment.count(token)
    logits = np.zeros(1000, np.float32)
    adjustment.apply(logits, ())
    assert logits.tolist() == [-float(output.count(i)) for i in range(1000)]


def test_log_probabilities_are_the_models_whatever_the_request_changes():
    logits = normal_logits(2.0)
    expected = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    p = SamplingParameters(temperature=0.5, logit_bias={17: 100.0})
    (drawn,) = Sampler(SIZE).sample(logits[None].copy(), [Row(p, 0, Adjustment(p, (), ()), (), 20)])
    assert drawn.token == 17
    assert drawn.logprob.logprob == pytest.approx(expected[17], abs=1e-5)
    assert drawn.logprob.rank == 1 + (logits > logits[17]).sum()
    assert drawn.logprob.top_ids == np.argsort(-logits, kind="stable")[:20].tolist()
    np.testing.assert_allclose(drawn.logprob.top_logprobs, expected[drawn.logprob.top_ids], atol=1e-5)


@pytest.mark.parametrize("parameters", [SamplingParameters(temperature=0), SamplingParameters()], ids=["greedy", "sampled"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_fail_their_row_alone(parameters, bad):
    logits = np.stack([normal_logits(1.0), normal_logits(1.0)])
    logits[0, 5] = bad
    broken, sound = Sampler(SIZE).sample(logits, [Row(parameters, 0), Row(parameters, 0)])
    assert isinstance(broken.error, NotFinite)
    assert sound.error is None


@pytest.mark.parametrize("top_p", [1.0, 0.9], ids="top_p={}".format)
@pytest.mark.parametrize("temperature", [9e-6, 1e-30, 1e-40, 5e-324])
def test_the_coldest_temperatures_are_greedy(temperature, top_p):
    logits = normal_logits(0.01)
    logits[:5] = -np.inf
    p = SamplingParameters(temperature=temperature, top_p=top_p)
    drawn = Sampler(SIZE).sample(np.stack([logits] * 50), [Row(p, i, logprobs=1) for i in range(50)])
    assert {d.token for d in drawn} == {int(logits.argmax())}


@pytest.mark.parametrize("top_p", [1.0, 0.9], ids="top_p={}".format)
@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 100.0])
def test_a_row_with_one_possible_token_gives_it_at_any_temperature(temperature, top_p):
    logits = np.full(SIZE, -np.inf, np.float32)
    logits[777] = -3e38
    p = SamplingParameters(temperature=temperature, top_p=top_p)
    assert {d.token for d in Sampler(SIZE).sample(np.stack([logits] * 9), [Row(p, i) for i in range(9)])} == {777}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("temperature", [np.float32(1e-45), float("nan")])
def test_numbers_that_nothing_can_be_drawn_by_end_with_the_likeliest(temperature):
    # What the validators keep out would otherwise be drawn for ever, with the engine in it.
    logits = normal_logits(1.0)
    with np.errstate(all="ignore"):
        drawn = Drawer(SIZE).draw(logits, SamplingParameters(temperature=float(temperature), top_p=0.9), 0)
    assert drawn == logits.argmax()


@pytest.mark.parametrize("logprobs", [None, 0, 5])
@pytest.mark.parametrize(
    "parameters", [SamplingParameters(temperature=0), SamplingParameters(), SamplingParameters(top_p=0.9)], ids=repr
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_of_no_numbers_at_all_fail_alone(parameters, bad, logprobs):
    logits = np.stack([normal_logits(1.0), np.full(SIZE, bad, np.float32), normal_logits(1.0)])
    first, broken, last = Sampler(SIZE).sample(logits, [Row(parameters, 0, logprobs=logprobs) for _ in range(3)])
    assert isinstance(broken.error, NotFinite)
    assert first.error is None
    assert first == last


def test_a_nan_that_a_mask_hides_from_the_choice_still_fails_its_row_alone():
    logits = np.stack([normal_logits(1.0), normal_logits(1.0)])
    logits[0, 5] = np.nan
    broken, sound = Sampler(SIZE).sample(logits, [Row(SamplingParameters(), 0, masked=(5,), logprobs=3) for _ in range(2)])
    assert isinstance(broken.error, NotFinite)
    assert sound.error is None
