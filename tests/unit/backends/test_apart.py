"""What goes between an executor and the process of an outside backend arrives as it was."""

import json
import socket
from dataclasses import fields
from pathlib import Path

import ml_dtypes
import numpy as np
import psutil
import pytest
from fake_engine import fake_spec

from penstock.backends.apart import model
from penstock.backends.apart.frames import Ended, read_device_config, receive, send, write_device_config
from penstock.backends.contract import Available, Broken, Capabilities, DeviceConfig, DType, Task, Unavailable, Unsupported
from penstock.backends.reports import read_answer, write_answer

FULL = Capabilities(
    dtypes=(DType.INT4, DType.F32),
    tasks=(Task.TENSORS, Task.GENERATE),
    kv_layouts=("a", "b"),
    kv_dtypes=(DType.INT8,),
    prefix_cache=False,
    export_kv=True,
    max_context=9,
    weight_bytes={DType.INT4: 3},
    yields={DType.INT4: "is slow"},
)


@pytest.mark.parametrize(
    ("availability", "capabilities"),
    [
        (Available(("a:0", "cpu"), "1"), FULL),
        (Available(("cpu",), "", {"b:0": "no driver"}), Unsupported("no")),
        (Broken("x"), None),
        (Unavailable("y"), None),
    ],
)
def test_an_answer(availability, capabilities):
    assert read_answer(json.loads(json.dumps(write_answer(availability, capabilities)))) == (availability, capabilities)


def test_a_device_config():
    config = DeviceConfig(dtype=DType.BF16, kv_cache_dtype=DType.INT8, weight_cache=Path("/some/where"), threads=3)
    assert read_device_config(json.loads(json.dumps(write_device_config(config)))) == config
    assert read_device_config(json.loads(json.dumps(write_device_config(DeviceConfig())))) == DeviceConfig()
    assert {f.name for f in fields(DeviceConfig)} == write_device_config(config).keys()


def test_arrays():
    arrays = {"a": np.arange(6, dtype=np.int64).reshape(2, 3), "b": np.ones(0, np.int32), "c": np.ones((1, 2), ml_dtypes.bfloat16)}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send(ours, "step", {"x": 1}, arrays)
        kind, told, got = receive(theirs)
        assert (kind, told, got.keys()) == ("step", {"x": 1}, arrays.keys())
        assert all(got[n].dtype == arrays[n].dtype and np.array_equal(got[n], arrays[n]) for n in arrays)
        ours.close()
        with pytest.raises(Ended):
            receive(theirs)


@pytest.mark.parametrize(
    "raw", [b"\xff\xff\xff\xff", b"\x02\x00\x00\x00{}", b'\x30\x00\x00\x00{"kind":"x","facts":{},"arrays":{"a":["O",[9]]}}  ']
)
def test_what_is_no_frame_is_refused(raw):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(raw)
        ours.close()
        with pytest.raises(ValueError, match=r"a head of|no frame|an array of"):
            receive(theirs)


def test_a_process_that_can_not_be_begun_leaves_no_descriptor(monkeypatch):
    monkeypatch.setattr(model, "_COMMAND", ("/there is no such interpreter",))
    before = psutil.Process().num_fds()
    with pytest.raises(FileNotFoundError) as raised:  # holds what its frames held
        model.ModelApart("any", fake_spec(), DeviceConfig())
    assert psutil.Process().num_fds() <= before
    assert raised.value.filename == "/there is no such interpreter"
