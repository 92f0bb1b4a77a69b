"""From a configuration to an engine: what loading leaves behind in its process."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import psutil
import pytest
from structlog.testing import capture_logs

from penstock.common.service import StartError
from penstock.executor import loading
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


@pytest.mark.parametrize("calibration_seconds", [0, 0.1])
@pytest.mark.parametrize(
    ("settings", "chunked"),
    [({"max_context": most}, True) for most in (2, 3, 4, 5)]
    + [({"max_batch_tokens": most, "max_batch_size": most - 1}, False) for most in (2, 3, 64)],
)
def test_the_least_settings_that_are_allowed_start(settings, chunked, calibration_seconds, monkeypatch, tmp_path):
    chosen = loading.select

    def select(*of, **how):
        selection = chosen(*of, **how)
        return replace(selection, capabilities=replace(selection.capabilities, chunked_prefill=chunked))

    monkeypatch.setattr(loading, "select", select)
    with capture_logs() as logs:
        loaded = load(
            ExecutorConfig(backend="fake", cache_folder=str(tmp_path), calibration_seconds=calibration_seconds, **settings)
        )
    loaded.engine.close()
    assert "calibration failed" not in [line["event"] for line in logs]
