import os
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.cli import grpc_threads
from penstock.cli.grpc_threads import with_fewer_threads

CALLS = 300
# Answers so many health checks over loopback, and tells how often threads of the event engine woke up meanwhile.
WOKEN = f"""
import asyncio
import contextlib
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.common.channel import connect
from penstock.common.server import GrpcServer


def woken():
    counts = {{}}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended since it was listed
            if task.joinpath("comm").read_text().startswith("event_engine"):
                words = task.joinpath("status").read_text().split()
                counts[task.name] = int(words[words.index("voluntary_ctxt_switches:") + 1])
    return counts


async def main():
    server = GrpcServer()
    address = server.listen("127.0.0.1:0")
    await server.start()
    async with connect(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        await check(health_pb2.HealthCheckRequest())
        before = woken()
        for _ in range({CALLS}):
            await check(health_pb2.HealthCheckRequest())
        print(sum(count - before.get(thread, 0) for thread, count in woken().items()))
    await server.stop(0)


asyncio.run(main())
"""


def test_what_somebody_chose_stands():
    assert with_fewer_threads({"GRPC_EXPERIMENTS": ""}) == {}


@pytest.mark.parametrize(("release", "chosen"), [("1.84.0", True), ("1.85.1", True), ("1.86.0rc1", False), ("2.0.0", False)])
def test_releases_that_were_not_tried_keep_their_default(monkeypatch, release, chosen):
    monkeypatch.setattr(grpc_threads, "version", lambda _: release)
    assert bool(with_fewer_threads({})) is chosen


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux, which tells what threads do")
def test_the_event_engine_sleeps_and_grpc_knows_the_words():
    clean = {key: value for key, value in os.environ.items() if key != "GRPC_EXPERIMENTS"}
    added = with_fewer_threads(clean)
    if not added:
        pytest.skip("this release of grpcio keeps its default")
    told = {}
    for name, environment in (("default", clean), ("ours", clean | added)):
        process = subprocess.run(
            [sys.executable, "-c", WOKEN], env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        told[name] = int(process.stdout)
        assert "experiment" not in process.stderr
    assert told["default"] > CALLS
    assert told["ours"] < CALLS / 4
