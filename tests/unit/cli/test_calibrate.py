"""`penstock calibrate`: what it measures stands where `--backend auto` looks."""

import json
import subprocess
import sys

import pytest

from penstock.backends.contract import DType
from penstock.backends.ranking import rivals
from penstock.backends.registry import standings
from penstock.cli.backends import read_spec
from penstock.common.calibrations import Calibrations
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load

PENSTOCK = [sys.executable, "-m", "penstock.cli"]


def run(*arguments, **options):
    return subprocess.run([*PENSTOCK, *arguments], capture_output=True, text=True, check=False, **options)


def rivals_in(dtype):
    """Names of the backends between which speed decides here."""
    return [s.report.name for s in rivals(standings(read_spec("builtin", None), dtype))]


def test_every_backend_that_can_is_measured_and_auto_goes_by_it(tmp_path):
    asked = ("--dtype", "bf16", "--threads", "1", "--cache-folder", str(tmp_path))
    first = run("calibrate", "builtin", "--kv-cache-gib", "0.05", "--calibration-seconds", "0.3", *asked)
    assert first.returncode == 0, first.stderr
    able = [line.split()[1] for line in first.stderr.splitlines() if line.startswith("measuring")]
    assert able == rivals_in(DType.BF16)
    told = json.loads(run("backends", "--model", "builtin", "--json", *asked).stdout)
    measured = [row for row in told if row["speed"]]
    assert [row["name"] for row in measured] == able
    assert min(measured, key=lambda row: row["speed"]["seconds"])["verdict"] == "chosen"


def test_what_an_executor_has_left_is_measured_anew(tmp_path):
    settings = {
        "model": "builtin",
        "backend": "fake",
        "kv_cache_gib": 0.05,
        "cache_folder": str(tmp_path),
        "calibration_seconds": 0.1,
    }
    load(ExecutorConfig(**settings)).engine.close()
    (left,) = Calibrations(tmp_path).records()
    done = run("calibrate", "builtin", "--backend", "fake", "--cache-folder", str(tmp_path), "--calibration-seconds", "0.1")
    assert done.stdout.startswith("fake f32: prefill")
    (found,) = Calibrations(tmp_path).records()
    assert found.key == left.key
    assert found.measured_at > left.measured_at


def test_one_that_can_not_be_measured_does_not_keep_the_others_from_it(tmp_path):
    done = run("calibrate", "builtin", "--dtype", "bf16", "--kv-cache-gib", "1e-9", "--cache-folder", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("measuring") == len(rivals_in(DType.BF16))
    assert "not measured" in done.stdout


def test_speeds_that_can_not_be_kept_are_none(tmp_path):
    (tmp_path / "calibrations").write_text("in the way of a folder")
    done = run("calibrate", "builtin", "--backend", "fake", "--cache-folder", str(tmp_path), "--calibration-seconds", "0.1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "penstock: --cache-folder: what fake was measured to do could not be kept there"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("builtin", "--backend", "npu"), "there is no backend npu"),
        (("/nowhere",), "/nowhere"),
        (("builtin", "--backend", "fake", "--dtype", "bf16"), "fake: has no bf16 for it"),
        (("builtin", "--threads", "0"), "threads: must be a number of at least 1"),
        (("builtin", "--calibration-seconds", "0"), "calibration_seconds: must be more than 0"),
        (("builtin", "--probe-seconds", "nan"), "probe_seconds: must be a number"),
    ],
)
def test_what_can_not_be_is_refused_in_one_line(tmp_path, arguments, reason):
    done = run("calibrate", *arguments, "--cache-folder", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("penstock: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


INTERRUPTED = """
import os, signal, sys
from penstock.cli.app import _run
from penstock.executor import tuning
measure = tuning.measure
def interrupted(*given, **named):
    os.kill(os.getpid(), signal.SIGINT)
    return measure(*given, **named)
tuning.measure = interrupted
sys.exit(_run())
"""


def test_ctrl_c_amid_a_measurement_ends_it_without_a_word(tmp_path):
    # A backend computes in another thread then, and must not be asked to end in good order.
    asked = ("calibrate", "builtin", "--backend", "torch", "--dtype", "f32", "--cache-folder", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, *asked], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
