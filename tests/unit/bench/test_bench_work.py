import itertools
import random

import pytest

from penstock.cli.bench.options import Work
from penstock.cli.bench.scenarios import SCENARIOS, Poisson, named, prompts
from penstock.common.config import ConfigError


def test_the_scenarios_are_those_that_other_engines_were_timed_on():
    assert [(s.name, s.requests, s.prompt_tokens, s.new_tokens) for s in SCENARIOS] == [
        ("prefill-512", 1, 512, 1),
        ("decode-b1", 1, 16, 65),
        ("decode-b8", 8, 16, 65),
        ("decode-b32", 32, 16, 65),
        ("mixed-b16", 16, 256, 64),
    ]


@pytest.mark.parametrize("vocabulary", [15_000, 151_936])
def test_prompts_are_the_same_for_every_large_vocabulary(vocabulary):
    rng = random.Random(3)
    assert prompts(4, 16, 3, vocabulary) == [[rng.randrange(100, 15000) for _ in range(16)] for _ in range(4)]


@pytest.mark.parametrize("vocabulary", [1, 100, 101, 768])
def test_prompts_stay_within_a_small_vocabulary(vocabulary):
    assert all(0 <= i < vocabulary for prompt in prompts(8, 64, 0, vocabulary) for i in prompt)


def test_poisson_arrivals_have_the_rate_and_the_lengths_that_were_asked_for():
    load = Poisson(rate=50, duration=40, prompt_tokens=100, new_tokens=20, spread=0.5)
    work = load.work(seed=1, vocabulary=768)
    assert work == load.work(seed=1, vocabulary=768)
    assert len(work) == pytest.approx(2000, rel=0.1)
    times = [r.at for r in work]
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 40
    assert {len(r.prompt) for r in work} == set(range(50, 151))
    assert {r.new_tokens for r in work} == set(range(10, 31))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert sum(g > 1 / 50 for g in gaps) / len(gaps) == pytest.approx(0.368, abs=0.05)  # exponential, not even


def test_without_spread_lengths_are_exact():
    work = Poisson(rate=10, duration=5, prompt_tokens=7, new_tokens=3, spread=0).work(0, 768)
    assert {(len(r.prompt), r.new_tokens) for r in work} == {(7, 3)}


def test_all_scenarios_unless_some_are_named():
    assert named(()) == list(SCENARIOS)
    assert [s.name for s in named(("mixed-b16", "decode-b1"))] == ["decode-b1", "mixed-b16"]


@pytest.mark.parametrize(
    ("options", "named_option"),
    [
        ({"scenario": ("decode-b2",)}, "--scenario"),
        ({"repeats": 0}, "--repeats"),
        ({"rate": -1.0}, "--rate"),
        ({"rate": float("nan")}, "--rate"),
        ({"rate": 1.0, "duration": 0.0}, "--duration"),
        ({"rate": 1.0, "output_tokens": 0}, "--output-tokens"),
        ({"rate": 1.0, "spread": 1.0}, "--spread"),
        ({"rate": 1.0, "scenario": ("decode-b1",)}, "--rate and --scenario"),
    ],
)
def test_wrong_options_are_refused_by_name(options, named_option):
    with pytest.raises(ConfigError, match=f"^{named_option}"):
        Work(**options).scenarios()
