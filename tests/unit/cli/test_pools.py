"""How many executors of each role there are, what each is called, and what it gets of the machine."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.app import app
from penstock.cli.cluster.plan import Plan
from penstock.cli.cluster.pools import MOST_EXECUTORS, ROLES, first_plans, joining_plans, pools, scaled
from penstock.cli.cluster.settings import UpConfig
from penstock.common.config import ConfigError

COUNTS = st.integers(0, 8)
POOLS = st.tuples(COUNTS, COUNTS, COUNTS).filter(any).map(lambda counts: dict(zip(ROLES, counts, strict=True)))


def command(planned, **settings):
    plan = Plan(served_name="m", folder=Path("/models/m"), settings=UpConfig(**settings), doors={})
    argv = plan.executor(planned, scheduler="127.0.0.1:1").argv
    return {flag: value for flag, value in pairwise((*argv, "")) if flag.startswith("--")}


def test_without_a_word_there_is_one_executor_that_does_both_with_the_whole_machine():
    (only,) = first_plans(UpConfig().pools, None)
    assert (only.name, only.role, only.threads, only.kv_cache_share) == ("executor", "both", None, None)
    told = command(only)
    assert told["--role"] == "both"
    assert not {"--threads", "--kv-cache-share"} & set(told)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"workers": 2}, ["executor-0", "executor-1"]),
        ({"prefill": 1, "decode": 2}, ["prefill-0", "decode-0", "decode-1"]),
        ({"decode": 1, "workers": 1}, ["decode-0", "executor-0"]),
        ({"prefill": 1}, ["prefill-0"]),
        ({"decode": 1, "workers": 0}, ["decode-0"]),
    ],
)
def test_executors_are_named_after_their_roles(settings, names):
    assert [planned.name for planned in first_plans(UpConfig(**settings).pools, None)] == names


@given(POOLS, st.integers(1, 128))
def test_a_start_gives_every_thread_away_and_no_more_than_half_of_the_memory(counts, threads):
    plans = first_plans(counts, threads)
    assert Counter(planned.role for planned in plans) == +Counter(counts)
    assert len({planned.name for planned in plans}) == len(plans)
    shares = [planned.threads for planned in plans]
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(threads, len(plans))
    assert sum(planned.kv_cache_share or 0.5 for planned in plans) == pytest.approx(0.5, rel=0.01)


@given(POOLS, POOLS, st.integers(1, 128))
def test_newcomers_take_free_names_and_what_each_would_have_had_from_the_start(before, after, threads):
    taken = {planned.name for planned in first_plans(before, threads)}
    together = max(1, threads // sum(after.values()))
    for role in ROLES:
        joining = joining_plans(role, after[role], sum(after.values()), threads, taken)
        assert all(planned.threads == together and planned.role == planned.pool == role for planned in joining)
        names = {planned.name for planned in joining}
        assert len(names) == after[role]
        assert not names & taken
        assert "executor-0" not in names or "executor" not in taken


def test_scaling_leaves_alone_what_it_was_not_asked_for():
    assert scaled({"prefill": 1, "decode": 1, "both": 0}, {"decode": 3}) == {"prefill": 1, "decode": 3, "both": 0}
    assert scaled({"prefill": 1, "decode": 1, "both": 0}, {"prefill": 0}) == {"prefill": 0, "decode": 1, "both": 0}


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"prefill": 0, "decode": 0}, "must be from 1 to 64 executors together, and are 0"),
        ({"decode": MOST_EXECUTORS}, "must be from 1 to 64 executors together, and are 65"),
        ({"decode": MOST_EXECUTORS + 1}, "--decode: must be from 0 to 64, and is 65"),
        ({"both": -1}, "--workers: must be from 0 to 64, and is -1"),
    ],
)
def test_scaling_refuses_what_would_leave_nobody_or_start_thousands(wanted, why):
    with pytest.raises(ConfigError, match=why):
        scaled(pools(1, 1, None), wanted)


def test_a_pool_may_have_a_backend_and_dtypes_of_its_own():
    settings = {"prefill": 1, "decode": 1, "backend": "onnxruntime", "dtype": "f32", "prefill_backend": "torch"}
    prefill, decode = first_plans(UpConfig(**settings).pools, 2)
    told = command(prefill, **settings, decode_kv_cache_dtype="int8")
    assert (told["--backend"], told["--dtype"], told.get("--kv-cache-dtype")) == ("torch", "f32", None)
    told = command(decode, **settings, decode_kv_cache_dtype="int8")
    assert (told["--backend"], told["--dtype"], told.get("--kv-cache-dtype")) == ("onnxruntime", "f32", "int8")


def test_an_executor_of_another_role_keeps_its_pools_backend():
    settings = {"prefill": 1, "decode": 1, "prefill_backend": "torch"}
    prefill, _ = first_plans(UpConfig(**settings).pools, 2)
    told = command(replace(prefill, role="decode"), **settings)
    assert (told["--role"], told["--backend"]) == ("decode", "torch")


def test_what_is_given_goes_to_the_services_though_it_is_the_default():
    (only,) = first_plans(UpConfig().pools, None)
    told = command(only, dtype="auto", backend="auto", prefix_cache=True)
    assert (told["--dtype"], told["--backend"]) == ("auto", "auto")
    assert "--prefix-cache" in told
    assert "--no-prefix-cache" in command(only, prefix_cache=False)
    assert not {"--dtype", "--backend", "--prefix-cache", "--no-prefix-cache"} & command(only).keys()


@pytest.mark.parametrize(
    ("words", "variables", "given"),
    [
        ([], {}, set()),
        (["--dtype", "auto", "--prefix-cache"], {}, {"dtype", "prefix_cache"}),
        ([], {"PENSTOCK_UP_PLACEMENT": "auto"}, {"placement"}),
        (["--backend", "auto"], {"PENSTOCK_LOG_LEVEL": "info"}, {"backend", "log_level"}),
    ],
)
def test_a_flag_and_a_variable_are_given_whatever_they_say(words, variables, given, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    _, bound, _ = app.parse_args(["up", "builtin", *words])
    assert bound.arguments.get("settings", UpConfig()).given == given


def test_a_variable_for_all_commands_is_left_to_each(monkeypatch):
    (only,) = first_plans(UpConfig().pools, None)
    monkeypatch.setenv("PENSTOCK_LOG_LEVEL", "info")
    assert "--log-level" not in command(only, log_level="info")
    assert command(only, log_level="debug")["--log-level"] == "debug"
