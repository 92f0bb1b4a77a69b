"""From a configuration to an engine: what loading leaves behind in its process."""

import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load
from penstock.executor.passing_thread import on_a_passing_thread


def threads():
    return {thread.id for thread in psutil.Process().threads()}


def test_loading_leaves_no_helpers_of_openmp_that_an_engines_steps_would_have_to_wake(tmp_path):
    # More of them than cores make the steps twice as long; how long is no test's to say.
    config = ExecutorConfig(
        model="builtin",
        backend="torch",
        dtype="int8",
        threads=2,
        cache_folder=str(tmp_path),
        calibration_seconds=0,
        kv_cache_gib=0.1,
    )
    with ThreadPoolExecutor(1) as thread:  # one that has computed nothing yet, and lives on behind the loading
        thread.submit(int).result()
        before = threads()
        loaded = thread.submit(load, config).result()
        try:
            deadline = time.monotonic() + 30
            while (left := threads() - before) and time.monotonic() < deadline:
                time.sleep(0.01)  # they end a moment behind the one that they helped
            assert not left
        finally:
            loaded.engine.close()


def test_work_on_a_passing_thread_raises_where_it_is_waited_for():
    with pytest.raises(StartError, match="no room"):
        on_a_passing_thread(lambda: (_ for _ in ()).throw(StartError("no room")))
    assert on_a_passing_thread(lambda: 7) == 7
