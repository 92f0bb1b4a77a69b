"""The event log: every event a line, in order, from whatever thread; never in the way of who tells."""

import json
import os
import threading
import time

import pytest
from structlog.testing import capture_logs

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


def test_a_disk_that_fills_up_stops_the_log_and_nothing_else():
    with capture_logs() as logs:
        log = EventLog("/dev/full", "gateway")
        log._thread.join()
        log.tell("token", {"request": 1})
        log.close()
    assert [line["event"] for line in logs] == ["the event log can not be written"]
