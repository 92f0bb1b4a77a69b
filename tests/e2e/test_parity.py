"""Prefill and decode apart answer as together does, on Penstock's own backends: the parity kit on whole clusters in this process."""

import json
from dataclasses import replace

import pytest
from in_process import cluster

from penstock.cli.app import app
from penstock.common.config import ConfigError
from penstock.executor.config import ExecutorConfig

# Of different backends, which share no last bit: what they draw, and what they are drawn from within f32's rounding.
ACROSS = ("greedy", "prompt_lengths", "logprobs", "seeds")
# Of requests that run alone: what torch computes in bfloat16 depends on how many rows go through a product.
ALONE = ("greedy", "prompt_lengths", "logprobs", "prompt_logprobs", "stop_token", "usage")


def executor(backend, role="both", **changes):
    # Small steps, so that a prompt of the kit is longer than one; no calibration, so that they are of the same size everywhere.
    config = ExecutorConfig(
        role=role,
        backend=backend,
        dtype="f32",
        threads=1,
        kv_cache_gib=0.05,
        max_batch_size=8,
        max_batch_tokens=192,
        prefill_chunk=64,
        calibration_seconds=0,
        load_seconds=60,
        handoff_lease_seconds=60,  # what is compared is what is handed over, and not what a busy machine does about a late one
        handoff_window_mib=32,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def together():
    with cluster([executor("openvino")], "together") as door:
        yield door


def parity(capsys, together, apart, *flags):
    flags = ["--together", together, "--apart", apart, "--json", *flags]
    status = app(["parity", *flags], exit_on_error=False, print_error=False, result_action="return_value")
    return status, {told["check"]: told for told in json.loads(capsys.readouterr().out)}


def named(checks):
    return [word for name in checks for word in ("--check", name)]


def failures(told):
    return {name: one["why"] for name, one in told.items() if one["outcome"] != "passed"}


def test_apart_on_one_backend_is_the_same_to_the_last_bit(together, capsys):
    with cluster([executor("openvino", "prefill"), executor("openvino", "decode")], "apart") as apart:
        status, told = parity(capsys, together, apart)
    assert (status, failures(told)) == (0, {})
    assert max(one["logprob_difference"] for one in told.values()) == 0
    assert told["prompt_lengths"]["apart"] == told["prompt_lengths"]["requests"]
    assert sum(size for one in told.values() for size in (one["kv_bytes"] or {}).values()) > 1 << 20


@pytest.mark.parametrize(("prefill", "decode"), [("torch", "openvino"), ("openvino", "onnxruntime")])
def test_apart_across_backends_is_the_same_in_every_token(together, capsys, prefill, decode):
    with cluster([executor(prefill, "prefill"), executor(decode, "decode")], "apart") as apart:
        status, told = parity(capsys, together, apart, "--tolerance", "1e-4", *named(ACROSS))
    assert (status, failures(told)) == (0, {})
    assert told["prompt_lengths"]["apart"] == told["prompt_lengths"]["requests"]
    assert 0 < told["logprobs"]["logprob_difference"] < 1e-4


@pytest.mark.parametrize(
    ("backend", "changes", "checks"), [("openvino", {"kv_cache_dtype": "int8"}, ()), ("torch", {"dtype": "bf16"}, ALONE)]
)
def test_a_rounded_cache_goes_over_as_it_lies_and_is_the_same_to_the_last_bit(capsys, backend, changes, checks):
    pools = [executor(backend, role, **changes) for role in ("prefill", "decode")]
    with cluster([executor(backend, **changes)], "together") as whole, cluster(pools, "apart") as apart:
        status, told = parity(capsys, whole, apart, *named(checks))
    assert (status, failures(told)) == (0, {})
    assert sum(one["logprobs"] for one in told.values()) > 100
    assert max(one["logprob_difference"] for one in told.values()) == 0
    assert all(one["native"] == one["apart"] for one in told.values())


def test_from_one_rounding_to_another_it_is_converted_and_answers_stay_near(together, capsys):
    pools = [executor("torch", "prefill", dtype="bf16"), executor("openvino", "decode", kv_cache_dtype="int8")]
    with cluster(pools, "apart") as apart:
        # Unlikely tokens behind prompts of random ids are off by some tenths of a nat with the cache of eight bits alone.
        status, told = parity(
            capsys, together, apart, "--rounded", "--tolerance", "1.5", *named(("chat", "logprobs", "prompt_lengths"))
        )
    assert (status, failures(told)) == (0, {})
    assert told["prompt_lengths"]["apart"] == told["prompt_lengths"]["requests"]
    assert all(one["native"] == 0 for one in told.values())
    assert 0 < told["logprobs"]["logprob_difference_mean"] < 0.05
    assert told["chat"]["alike"] == told["chat"]["tokens"] > 3


def test_a_cluster_that_runs_together_does_not_pass_for_one_that_runs_apart(together, capsys):
    status, told = parity(capsys, together, together, "--check", "greedy")
    assert status == 1
    assert "apart: ran together, by placement reason" in failures(told)["greedy"]


@pytest.mark.parametrize("away", ["--together", "--apart"])
def test_the_cluster_that_is_away_is_named(together, away):
    doors = {"--together": together, "--apart": together, away: "127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"^127\.0\.0\.1:1: .*is a model served there"):
        app(["parity", *(word for door in doors.items() for word in door)], exit_on_error=False, print_error=False)
