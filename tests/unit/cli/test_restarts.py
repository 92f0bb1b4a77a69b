import asyncio
import io
from types import SimpleNamespace

import pytest

from penstock.cli.cluster import member
from penstock.cli.cluster.child import Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.restarts import Backoff, RestartPolicy
from penstock.cli.cluster.settings import UpConfig
from penstock.executor.config import ExecutorConfig


def test_waits_twice_as_long_each_time_up_to_a_bound_and_then_gives_up():
    backoff = Backoff(RestartPolicy(limit=4, first_delay=1, longest_delay=3))
    assert [backoff.after_death(0) for _ in range(5)] == [1, 2, 3, 3, None]


def test_a_long_life_starts_the_count_again():
    backoff = Backoff(RestartPolicy(limit=2, first_delay=1, healthy_after=60))
    assert [backoff.after_death(0), backoff.after_death(0), backoff.after_death(60), backoff.after_death(59)] == [1, 2, 1, 2]
    assert backoff.after_death(59) is None


@pytest.mark.parametrize(("loading", "serving", "gives_up"), [(3600, 59, True), (0, 61, False)])
async def test_a_life_is_the_time_of_serving_however_long_a_model_loads(monkeypatch, loading, serving, gives_up):
    """A clock of its own: each process loads for so long, serves for so long, and dies."""
    now, deaths = [0.0], []

    class Child:
        pid = 1

        @classmethod
        async def spawn(cls, *_):
            return cls()

        async def listening(self):
            now[0] += loading
            return {}

        async def exited(self):
            now[0] += serving
            deaths.append(now[0])
            if len(deaths) == 10:
                assert not gives_up
                await asyncio.Event().wait()
            return "killed by SIGKILL"

    monkeypatch.setattr(member, "Child", Child)
    monkeypatch.setattr(member, "time", SimpleNamespace(monotonic=lambda: now[0]))
    backoff = Backoff(RestartPolicy(limit=3, first_delay=0, healthy_after=60))
    kept = member.Member(Program(name="executor", service="executor", argv=()), 0, Console(io.StringIO(), as_json=True), backoff)
    await kept.start()
    keeping = asyncio.create_task(kept.keep())
    if gives_up:
        with pytest.raises(member.GaveUp, match="executor died 4 times in a row, last: killed by SIGKILL"):
            await keeping
    else:
        while len(deaths) < 10:  # noqa: ASYNC110  nothing tells when the last of them serves
            await asyncio.sleep(0)
        keeping.cancel()


def test_a_step_that_hangs_every_time_is_no_long_life():
    executor = ExecutorConfig(model="m")
    assert UpConfig().healthy_seconds > executor.stall_exit_seconds + executor.stall_seconds
