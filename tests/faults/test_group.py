"""Members of a supervised group that come and leave while it runs: real processes of a tiny service."""

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from penstock.cli.cluster import group as module
from penstock.cli.cluster.child import Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.group import Group
from penstock.cli.cluster.member import State
from penstock.cli.cluster.restarts import RestartPolicy
from penstock.common.service import StartError

SERVICE = str(Path(__file__).with_name("tiny_service.py"))


class Lines:
    """What a console writes, and somebody who waits for a line of it."""

    def __init__(self):
        self.told = ""
        self._more = asyncio.Event()

    def write(self, text):
        self.told += text
        self._more.set()

    def flush(self):
        pass

    def isatty(self):
        return False

    async def wait_for(self, text):
        async with asyncio.timeout(30):
            while text not in self.told:
                self._more.clear()
                await self._more.wait()


@pytest.fixture
def lines():
    return Lines()


@pytest.fixture
async def group(lines):
    group = Group(Console(lines), RestartPolicy(limit=3, first_delay=0.01))
    yield group
    await group.kill()


def program(name, behaviour):
    return Program(
        name=name, service=name, argv=(sys.executable, SERVICE, name, behaviour), listen={"grpc": ("--listen", "127.0.0.1:0")}
    )


async def test_members_are_out_of_reach_of_ctrl_c_but_share_processors_as_one(group):
    """Between sessions they are shared out another way, by which short work waits long."""
    await group.start(program("worker", "serves"), stage=0)
    pid = group.members["worker"].pid
    assert os.getpgid(pid) == pid
    assert os.getsid(pid) == os.getsid(0)


async def test_a_member_that_leaves_drains_and_is_not_started_again(group, lines):
    await group.start(program("base", "serves"), stage=0)
    await group.start(program("worker", "serves"), stage=1)
    worker = group.members["worker"]
    pid = worker.pid
    leaving = asyncio.create_task(group.remove("worker", grace=30))
    await lines.wait_for("worker     | draining")
    assert worker.state is State.LEAVING
    await leaving
    assert "worker     | closed" in lines.told
    assert not psutil.pid_exists(pid)
    assert list(group.members) == ["base"]
    assert not group.failed.done()
    assert (await group.start(program("worker", "serves"), stage=1))["grpc"]


async def test_one_that_can_not_start_leaves_its_name_to_the_next(group):
    with pytest.raises(StartError, match="worker can not start: the model is not there"):
        await group.start(program("worker", "refuses"), stage=1)
    assert group.members == {}
    assert not group.failed.done()
    await group.start(program("worker", "serves"), stage=1)
    assert group.members["worker"].state is State.RUNNING


async def test_a_member_that_leaves_while_it_is_being_started_again_is_ended(group, lines):
    await group.start(program("worker", "serves"), stage=1)
    worker = group.members["worker"]
    worker.program = program("worker", "never starts")
    psutil.Process(worker.pid).kill()
    await lines.wait_for("starts again in")
    await group.remove("worker", grace=30)
    assert worker.pid is None
    assert group.members == {}


async def test_the_end_of_the_group_cuts_no_drain_short(group, lines, monkeypatch):
    monkeypatch.setattr(module, "_LEAVING_SECONDS", 0.0)
    await group.start(program("worker", "drains for ever"), stage=1)
    leaving = asyncio.create_task(group.remove("worker", grace=30))
    await lines.wait_for("worker     | draining")
    leaving.cancel()
    # A second SIGTERM would end it at once, with a line of its own.
    await group.stop(grace=1.5)
    assert "did not end within 1.5 s and is killed" in lines.told
    assert "closed" not in lines.told
