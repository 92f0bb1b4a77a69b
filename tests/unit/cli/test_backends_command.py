"""`penstock backends`: what it is asked, and what it tells of the choice."""

import json
import math
import subprocess
import sys

import pytest

from penstock.backends.contract import Available
from penstock.backends.inspection import BackendReport
from penstock.cli.backends import _cells, _row, backends
from penstock.common.config import ConfigError
from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load, prepare


def told(*arguments, before="pass"):
    """What it prints in a process of its own, whose logs it sets up."""
    code = f"import sys; {before}; from penstock.cli.app import main; sys.argv[0] = 'penstock'; main()"
    command = [sys.executable, "-c", code, "backends", "--model", "builtin", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)}


def test_it_reads_the_speeds_that_executors_left_in_a_folder_of_their_own(tmp_path):
    asked = ExecutorConfig(
        backend="openvino", dtype="f32", threads=1, kv_cache_gib=0.05, cache_folder=str(tmp_path), calibration_seconds=0.2
    )
    load(asked).engine.close()
    options = ("--dtype", "f32", "--threads", "1", "--cache-folder")
    assert told(*options, str(tmp_path))["openvino"]["speed"]["decode"] > 0
    assert told(*options, str(tmp_path / "other"))["openvino"]["speed"] is None


def test_without_a_home_it_tells_what_it_can(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    homeless = "import pathlib; pathlib.Path.home = lambda: pathlib.Path('~nobody-of-this-name').expanduser()"
    assert told(before=homeless)["fake"]["verdict"] == "by name alone"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"probe_seconds": -1}, "--probe-seconds: must be a number of at least 0.1, and is -1"),
        ({"probe_seconds": math.inf}, "--probe-seconds: must be a number of at least 0.1, and is inf"),
        ({"threads": -3}, "--threads: must be a number of at least 1, and is -3"),
    ],
)
def test_numbers_that_can_not_be_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        backends(**options)


@pytest.mark.parametrize("name", ["itl_target_ms", "probe_seconds", "calibration_seconds", "load_seconds", "stall_seconds"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_the_executor_refuses_them_too(name, value):
    with pytest.raises(StartError, match=f"{name}: must be a number of at least .*, not {value}"):
        prepare(ExecutorConfig(**{name: value}))


def test_devices_that_are_not_used_are_told_with_their_reason():
    here = Available(("cpu",), "1", {"cuda:0": "libcudnn.so.9 is missing"})
    assert _cells(_row(BackendReport("onnxruntime", "", here, None)))[-1] == "cpu; not on cuda:0: libcudnn.so.9 is missing"
