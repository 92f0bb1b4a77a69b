"""One service's process: what it says, how it drains, how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = str(Path(__file__).with_name("tiny_service.py"))


@pytest.fixture
def start():
    started = []

    def run(behaviour, *arguments, **options):
        process = subprocess.Popen(
            [sys.executable, SERVICE, "tiny", behaviour, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_until(stream, text):
    lines = []
    for line in stream:
        lines.append(line.rstrip("\n"))
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came, but {lines}")


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_tells_where_it_listens_and_drains_on_a_signal(start, signum):
    process = start("serves")
    assert process.stdout.readline().startswith("listening grpc=127.0.0.1:")
    process.send_signal(signum)
    out, err = process.communicate()
    assert process.returncode == 0
    assert out == ""
    said = [line for line in err.splitlines() if line in {"draining", "drained", "closed"}]
    assert said == ["draining", "drained", "closed"]


def test_a_closed_terminal_does_not_end_what_is_to_outlive_it(start):
    process = start("serves", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))  # as nohup does
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 0
    assert "drained" in err.splitlines()  # by the one signal that counts: a second would have cut it short


def test_a_collection_while_it_serves_does_not_look_at_what_it_was_started_with(start):
    """It would stand still for that, streams and all."""
    process = start("counts objects")
    told = read_until(process.stderr, "objects to look at")[-1]
    assert int(told.rpartition(" ")[2]) < 2000


def test_a_second_signal_ends_the_drain(start):
    process = start("drains for ever")
    process.stdout.readline()
    process.terminate()
    read_until(process.stderr, "draining")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert "closed" in err
    assert "drained" not in err


def test_the_grace_bounds_the_drain(start):
    process = start("drains for ever", "--grace", "0.05")
    process.stdout.readline()
    process.terminate()
    _, err = process.communicate()
    assert process.returncode == 0
    assert "closed" in err


def test_a_start_that_fails_is_one_line(start):
    process = start("refuses")
    out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert [line for line in err.splitlines() if line.startswith("penstock")] == ["penstock tiny: the model is not there"]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [("fails", "penstock tiny: stopped: RuntimeError: the engine stopped"), ("returns", "penstock tiny: stopped by itself")],
)
def test_a_service_that_dies_is_told_by_its_status(start, behaviour, why):
    process = start(behaviour)
    _, err = process.communicate()
    assert process.returncode == 1
    assert why in err.splitlines()
    assert "closed" in err


def test_a_signal_during_the_start_ends_it(start):
    process = start("never starts")
    read_until(process.stderr, "pid")
    process.terminate()
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out == ""


def test_it_ends_when_its_supervisor_does(start):
    read_end, write_end = os.pipe()
    process = start("serves", "--supervisor-fd", str(read_end), pass_fds=(read_end,))
    os.close(read_end)
    process.stdout.readline()
    assert process.poll() is None
    os.close(write_end)
    assert process.wait(30) == 1
