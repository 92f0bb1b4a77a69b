"""The event log: every event a line, in order, from whatever thread; never in the way of who tells."""

import errno
import json
import os
import threading
import time

import pytest
from structlog.testing import capture_logs
from suite import wait_for

from penstock.common.events import EventLog
from penstock.common.service import StartError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_lines_in_the_order_in_which_they_were_told(tmp_path):
    before = time.monotonic()
    log = EventLog(tmp_path / "events", "gateway")
    for n in range(1000):
        log.tell("token", {"request": n})
    log.close()
    log.close()
    opened, *told = lines(tmp_path / "events")
    assert (opened["event"], opened["service"]) == ("opened", "gateway")
    assert [line["request"] for line in told] == list(range(1000))
    assert {line["pid"] for line in told} == {os.getpid()}
    times = [opened["time"], *(line["time"] for line in told)]
    assert before - 1e-6 <= times[0] <= times[-1] <= time.monotonic() + 1e-6
    assert times == sorted(times)


def test_processes_append_to_one_file(tmp_path):
    for name in ("gateway", "executor"):
        EventLog(tmp_path / "events", name).close()
    assert [line["service"] for line in lines(tmp_path / "events")] == ["gateway", "executor"]


def test_what_does_not_fit_is_counted(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = EventLog(fifo, "gateway", most_waiting=4)
    for n in range(100_000):
        log.tell("token", {"request": n})
    os.set_blocking(reader, True)
    told = []
    reading = threading.Thread(target=lambda: told.extend(os.fdopen(reader)))
    reading.start()
    log.close()
    reading.join()
    events = [json.loads(line) for line in told]
    dropped = sum(event["count"] for event in events if event["event"] == "dropped")
    assert dropped > 0
    assert dropped + sum(event["event"] == "token" for event in events) == 100_000


def test_a_file_that_can_not_be_written_is_told_at_the_start(tmp_path):
    with pytest.raises(StartError, match=r"event_log: .*: No such file or directory"):
        EventLog(tmp_path / "nowhere" / "events", "gateway")


def test_a_full_disk_costs_events_and_is_written_again_when_there_is_room(tmp_path, monkeypatch):
    full, tried = threading.Event(), threading.Event()

    def write(file, data, write=os.write):
        """A disk that takes half a line before it is full."""
        if not full.is_set():
            return write(file, data)
        if not tried.is_set():
            tried.set()
            return write(file, data[:20])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with capture_logs() as logs:
        log = EventLog(tmp_path / "events", "gateway")
        assert wait_for((tmp_path / "events").read_text)
        full.set()
        log.tell("token", {"request": 1})
        assert wait_for(lambda: logs)
        log.tell("token", {"request": 2})
        assert wait_for(lambda: log._lost == 2)
        full.clear()
        log.tell("token", {"request": 3})
        log.close()
    assert [(line["event"], line["why"]) for line in logs] == [
        ("the event log can not be written: events are dropped until it can", "No space left on device")
    ]
    opened, torn, dropped, last = (tmp_path / "events").read_text().splitlines()
    assert json.loads(opened)["event"] == "opened"
    assert len(torn) == 20
    assert (json.loads(dropped)["event"], json.loads(dropped)["count"]) == ("dropped", 2)
    assert json.loads(last)["request"] == 3
