"""Prefill and decode apart answer as together does, on Penstock's own backends: the parity kit on whole clusters in this process."""

import json

import pytest
from in_process import cluster

from penstock.cli.app import app
from penstock.common.config import ConfigError
from penstock.executor.config import ExecutorConfig

# Of different backends, which share no last bit: what they draw, and what they are drawn from within f32's rounding.
ACROSS = ("greedy", "prompt_lengths", "logprobs", "seeds")


def executor(backend, role="both"):
    # Small steps, so that a prompt of the kit is longer than one; no calibration, so that they are of the same size everywhere.
    return ExecutorConfig(
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


@pytest.fixture(scope="module")
def together():
    with cluster([executor("openvino")], "together") as door:
        yield door


def parity(capsys, together, apart, *flags):
    flags = ["--together", together, "--apart", apart, "--json", *flags]
    status = app(["parity", *flags], exit_on_error=False, print_error=False, result_action="return_value")
    return status, {told["check"]: told for told in json.loads(capsys.readouterr().out)}


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
    checks = [word for name in ACROSS for word in ("--check", name)]
    with cluster([executor(prefill, "prefill"), executor(decode, "decode")], "apart") as apart:
        status, told = parity(capsys, together, apart, "--tolerance", "1e-4", *checks)
    assert (status, failures(told)) == (0, {})
    assert told["prompt_lengths"]["apart"] == told["prompt_lengths"]["requests"]
    assert 0 < told["logprobs"]["logprob_difference"] < 1e-4


def test_a_cluster_that_runs_together_does_not_pass_for_one_that_runs_apart(together, capsys):
    status, told = parity(capsys, together, together, "--check", "greedy")
    assert status == 1
    assert "apart: ran together, by placement reason" in failures(told)["greedy"]


@pytest.mark.parametrize("away", ["--together", "--apart"])
def test_the_cluster_that_is_away_is_named(together, away):
    doors = {"--together": together, "--apart": together, away: "127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"^127\.0\.0\.1:1: .*is a model served there"):
        app(["parity", *(word for door in doors.items() for word in door)], exit_on_error=False, print_error=False)
