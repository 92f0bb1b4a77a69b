"""The supervisor of `penstock up`, over tiny services in real processes."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CLUSTER = str(Path(__file__).with_name("tiny_cluster.py"))


class Cluster:
    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, CLUSTER, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.log = []

    def read_until(self, pattern):
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if re.search(pattern, line):
                return self.log[-1]
        raise AssertionError(f"{pattern!r} never came, but {self.log}")

    def pid(self, name):
        return int(self.read_until(rf"^{name} +\| pid").rsplit(" ", 1)[1])

    def end(self):
        out, err = self.process.communicate()
        self.log += err.splitlines()
        return out

    @property
    def pids(self):
        return [int(found[1]) for line in self.log if (found := re.search(r"\| pid (\d+)$", line))]

    def assert_nobody_is_left(self):
        assert self.pids
        alive = [psutil.Process(pid) for pid in self.pids if psutil.pid_exists(pid)]
        assert psutil.wait_procs(alive, timeout=30)[1] == []


@pytest.fixture
def cluster():
    started = []

    def start(*arguments):
        started.append(Cluster(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()
        if one.pids:
            one.assert_nobody_is_left()


def test_says_ready_once_and_drains_later_stages_first(cluster):
    tiny = cluster("serves")
    ready = tiny.process.stdout.readline()
    assert re.fullmatch(r"ready base=127\.0\.0\.1:\d+ worker=127\.0\.0\.1:\d+\n", ready)
    tiny.process.terminate()
    assert tiny.end() == ""
    assert tiny.process.returncode == 0
    ends = [line.split()[0] for line in tiny.log if line.endswith(("| drained", "| closed"))]
    assert ends == ["worker", "worker", "base", "base"]
    tiny.assert_nobody_is_left()


def test_a_member_that_dies_comes_back_on_its_port(cluster):
    tiny = cluster("serves")
    first = tiny.pid("worker")
    port = tiny.process.stdout.readline().rsplit(":", 1)[1].strip()
    psutil.Process(first).kill()
    assert "killed by SIGKILL" in tiny.read_until("died")
    second = tiny.pid("worker")
    assert second != first
    assert f"127.0.0.1:{port}" in psutil.Process(second).cmdline()
    tiny.process.terminate()
    assert tiny.end() == ""
    assert tiny.process.returncode == 0


def test_gives_up_on_a_member_that_dies_again_and_again(cluster):
    tiny = cluster("fails")
    tiny.end()
    assert tiny.process.returncode == 1
    deaths = [line for line in tiny.log if "starts again in" in line]
    assert len(deaths) == 3
    assert "penstock up: worker died 4 times in a row, last: stopped: RuntimeError: the engine stopped" in tiny.log
    tiny.assert_nobody_is_left()


def test_a_member_that_can_not_start_ends_the_cluster_with_one_line(cluster):
    tiny = cluster("refuses")
    assert tiny.end() == ""
    assert tiny.process.returncode == 1
    assert [line for line in tiny.log if "not there" in line] == ["penstock up: worker can not start: the model is not there"]
    tiny.assert_nobody_is_left()


def test_what_a_members_command_line_refuses_is_told(cluster):
    tiny = cluster("misconfigured")
    assert tiny.end() == ""
    assert tiny.process.returncode == 1
    assert [line for line in tiny.log if "unknown" in line] == [
        "penstock up: worker can not start: settings.yaml: worker: unknown setting x"
    ]
    tiny.assert_nobody_is_left()


def test_a_killed_supervisor_leaves_nobody_behind(cluster):
    tiny = cluster("serves")
    tiny.process.stdout.readline()
    tiny.process.kill()
    tiny.end()
    tiny.assert_nobody_is_left()


def test_a_second_signal_ends_all_at_once(cluster):
    tiny = cluster("drains for ever")
    tiny.process.stdout.readline()
    tiny.process.terminate()
    tiny.read_until("draining$")
    tiny.process.send_signal(signal.SIGINT)
    tiny.end()
    assert tiny.process.returncode == 128 + signal.SIGINT
    tiny.assert_nobody_is_left()


def test_a_signal_before_it_is_ready_ends_all(cluster):
    tiny = cluster("never starts")
    tiny.pid("worker")
    tiny.process.terminate()
    assert tiny.end() == ""
    assert tiny.process.returncode == 0
    tiny.assert_nobody_is_left()
