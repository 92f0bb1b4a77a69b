"""How a running cluster changes its executors: who comes, who goes, in which order, and what a failure leaves."""

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from penstock.cli.cluster import executors as module
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.executors import Executors
from penstock.cli.cluster.plan import Plan
from penstock.cli.cluster.settings import UpConfig
from penstock.common.config import ConfigError
from penstock.common.service import StartError


class Group:
    """Stands for the group of processes: members start at once, and leave when they are let."""

    def __init__(self):
        self.members = {}
        self.history = []
        self.broken = set()
        self.asked = asyncio.Event()
        self.leaving = asyncio.Event()
        self.leaving.set()

    async def start(self, program, stage):
        await asyncio.sleep(0)
        if program.name in self.broken:
            raise StartError(f"{program.name} can not start: no room")
        self.members[program.name] = SimpleNamespace(program=program, bound={"grpc": program.name})
        self.history.append(f"+{program.name}")
        return {"grpc": program.name}

    async def remove(self, name, grace):
        self.history.append(f"~{name}")
        self.asked.set()
        await self.leaving.wait()
        del self.members[name]
        self.history.append(f"-{name}")


@pytest.fixture
def roles_given(monkeypatch):
    """What the scheduler was told; executors serve as soon as they have started, and their ids are their names backwards."""
    given = []

    async def at_once(*_):
        pass

    async def executor_id(address, *_):
        await asyncio.sleep(0)
        return address[::-1]

    async def give_role(scheduler, executor, role):
        await asyncio.sleep(0)
        given.append((scheduler, executor, role))

    for name, stand_in in {"serving": at_once, "registered": at_once, "executor_id": executor_id, "give_role": give_role}.items():
        monkeypatch.setattr(module, name, stand_in)
    return given


@pytest.fixture
async def cluster(roles_given):
    group = Group()
    plan = Plan(served_name="m", folder=Path("/m"), settings=UpConfig(prefill=1, decode=1, threads=4), doors={})
    running = Executors(plan, group, Console(sys.stderr), "scheduler:1")
    assert await running.start() == {"prefill-0": "prefill-0", "decode-0": "decode-0"}
    group.history.clear()
    return running, group


async def test_newcomers_serve_before_anybody_leaves_and_the_latest_leave(cluster):
    executors, group = cluster
    events = []
    await executors.scale({"decode": 3}, events.append)
    assert sorted(group.history) == ["+decode-1", "+decode-2"]
    assert "decode-2 serves" in events
    group.history.clear()
    await executors.scale({"decode": 1, "both": 1}, events.append)
    assert group.history[0] == "+executor-0"
    assert list(group.members) == ["prefill-0", "decode-0", "executor-0"]
    assert list(executors.planned) == list(group.members)


async def test_newcomers_leave_the_first_one_its_port_for_metrics(roles_given):
    group = Group()
    plan = Plan(served_name="m", folder=Path("/m"), settings=UpConfig(), doors={}, metrics={"executor": "127.0.0.2:9013"})
    executors = Executors(plan, group, Console(sys.stderr), "scheduler:1")
    await executors.start()
    await executors.scale({"both": 2}, lambda _: None)
    await executors.set_role("executor", "prefill")
    where = {name: member.program.listen["metrics"] for name, member in group.members.items()}
    assert where == {"executor": ("--metrics", "127.0.0.2:9013"), "executor-1": ("--metrics", "127.0.0.2:0")}


async def test_one_that_can_not_start_is_told_and_nobody_leaves(cluster):
    executors, group = cluster
    group.broken = {"decode-1"}
    with pytest.raises(StartError, match="decode-1 can not start: no room"):
        await executors.scale({"decode": 3, "prefill": 0}, lambda _: None)
    assert list(group.members) == list(executors.planned) == ["prefill-0", "decode-0", "decode-2"]
    group.broken = set()
    await executors.scale({"decode": 3, "prefill": 0}, lambda _: None)
    assert sorted(group.members) == ["decode-0", "decode-1", "decode-2"]


async def test_a_second_change_waits_for_the_first(cluster):
    executors, group = cluster
    await executors.scale({"decode": 2}, lambda _: None)
    group.leaving.clear()
    first = asyncio.create_task(executors.scale({"decode": 1}, lambda _: None))
    second = asyncio.create_task(executors.scale({"decode": 3}, lambda _: None))
    third = asyncio.create_task(executors.set_role("decode-1", "prefill"))
    await group.asked.wait()
    assert "decode-1" in group.members
    group.history.clear()
    group.leaving.set()
    await asyncio.gather(first, second, third)
    assert group.history == ["-decode-1", "+decode-1", "+decode-2"]


@pytest.mark.parametrize("executor", ["decode-0", "0-edoced"])
async def test_a_role_is_given_by_name_or_id_and_kept_at_the_next_start(cluster, roles_given, executor):
    executors, group = cluster
    assert await executors.set_role(executor, "prefill") == "decode-0"
    assert roles_given == [("scheduler:1", "0-edoced", "prefill")]
    argv = group.members["decode-0"].program.argv
    assert argv[argv.index("--role") + 1] == "prefill"
    await executors.scale({"prefill": 1}, lambda _: None)
    assert group.history == ["~decode-0", "-decode-0"]


async def test_an_executor_that_is_not_there_is_refused(cluster, roles_given):
    executors, _ = cluster
    with pytest.raises(ConfigError, match=r"EXECUTOR: must be one of prefill-0, decode-0, or an executor's id, and is 'decode-7'"):
        await executors.set_role("decode-7", "both")
    with pytest.raises(ConfigError, match="from 1 to 64 executors together, and are 0"):
        await executors.scale({"prefill": 0, "decode": 0}, lambda _: None)
    assert roles_given == []
