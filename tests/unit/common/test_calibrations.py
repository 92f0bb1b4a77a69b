import json
import threading
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from penstock.common.cache import cache_folder
from penstock.common.calibrations import Calibrations, Key
from penstock.common.machine import machine, usable_cores
from penstock.common.step_times import Curve, StepTimes

KEY = Key(
    model="f00",
    backend="openvino",
    backend_version="2026.1",
    penstock="0.1.0",
    dtype="int8",
    kv="blocks/bf16",
    device="cpu",
    threads=2,
    machine="a processor",
)
TIMES = StepTimes(
    prefill=Curve((16, 64), (0.1, 0.3)),
    prefill_pair_seconds=1e-9,
    decode=Curve((1, 2), (1 / 3, 0.5)),
    decode_context=16,
    decode_token_seconds=1e-7,
)


def test_what_was_measured_is_read_back_to_the_last_bit(tmp_path):
    Calibrations(tmp_path / "not there yet").write(KEY, TIMES)
    assert Calibrations(tmp_path / "not there yet").read(KEY) == TIMES


@pytest.mark.parametrize("field", Key.__dataclass_fields__)
def test_another_model_backend_version_dtype_or_machine_is_measured_anew(tmp_path, field):
    store = Calibrations(tmp_path)
    store.write(KEY, TIMES)
    other = 4 if field == "threads" else "another"
    assert store.read(replace(KEY, **{field: other})) is None


def whole(**changed):
    return {"format": 1, "key": {f: getattr(KEY, f) for f in Key.__dataclass_fields__}, "measured_at": 1.0} | changed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b" " * (1 << 20) + b"{}",
        json.dumps(whole(format=2)).encode(),
        json.dumps(whole(times={"prefill": {"sizes": [], "seconds": []}})).encode(),
        json.dumps(whole(times={"prefill": {"sizes": [1], "seconds": ["nan"]}, "decode": {"sizes": [1], "seconds": [1]}})).encode(),
        json.dumps(whole(times={"prefill": 1})).encode(),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_corrupt_file_counts_as_absent_is_told_and_is_replaced(tmp_path, content):
    store = Calibrations(tmp_path)
    store.path(KEY).parent.mkdir()
    store.path(KEY).write_bytes(content)
    with capture_logs() as logs:
        assert store.read(KEY) is None
        assert not list(store.records())
    assert {line["event"] for line in logs} == {"unreadable calibration ignored"}
    store.write(KEY, TIMES)
    assert store.read(KEY) == TIMES


def test_folder_that_can_not_be_written_to_costs_a_warning(tmp_path):
    (tmp_path / "calibrations").write_text("a file stands where the folder would")
    with capture_logs() as logs:
        Calibrations(tmp_path).write(KEY, TIMES)
        assert Calibrations(tmp_path).read(KEY) is None
    assert [line["event"] for line in logs] == ["calibration not kept", "unreadable calibration ignored"]


def test_processes_that_write_at_once_leave_one_whole_record(tmp_path):
    store = Calibrations(tmp_path)
    versions = [replace(TIMES, decode_token_seconds=i * 1e-9) for i in range(8)]
    store.write(KEY, TIMES)
    stop, torn = threading.Event(), []

    def read():
        while not stop.is_set():
            if store.read(KEY) is None:
                torn.append(1)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda v=v: [store.write(KEY, v) for _ in range(20)]) for v in versions]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert not torn
    assert store.read(KEY) in versions
    assert [path.name for path in store.path(KEY).parent.iterdir()] == [store.path(KEY).name]


def test_records_tell_all_that_ran_here(tmp_path):
    store = Calibrations(tmp_path)
    assert not list(store.records())
    keys = [KEY, replace(KEY, backend="torch")]
    for key in keys:
        store.write(key, TIMES)
    found = list(store.records())
    assert {record.key.backend for record in found} == {"openvino", "torch"}
    assert found[0].measured_at >= found[1].measured_at
    assert found[0].times == TIMES


def test_cache_is_where_xdg_says_and_a_relative_path_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "penstock"
    assert cache_folder("~/own") == tmp_path / "own"
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cache_folder() == tmp_path / ".cache" / "penstock"


def test_machine_is_the_same_at_every_start():
    assert machine() == machine()
    assert usable_cores() >= 1
