"""What goes between an executor and the process of an outside backend arrives as it was."""

import json
import os
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
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import (
    Available,
    Broken,
    Capabilities,
    DeviceConfig,
    DType,
    ModelLost,
    StepBatch,
    Task,
    Unavailable,
    Unsupported,
)
from penstock.backends.discovery import Source
from penstock.backends.inspection import answer_of
from penstock.backends.reports import read_answer, write_answer
from penstock.common.service import StartError

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


# A backend whose fault is written in python, in its environment.
_ODD = """
import os
from dataclasses import replace
import numpy as np
from penstock.backends.contract import KvChunk, ModelLost, Registration
from penstock.backends.fake import FakeModel
from penstock.common.service import StartError

class Short(ValueError): pass

class Mute(OSError):
    def __str__(self): return None

class Model(FakeModel):
    def step(self, batch): exec(os.environ["ODD_STEP"])
    def export_kv(self, blocks, tokens): return KvChunk(tokens, super().export_kv(blocks, tokens).data.astype(np.float64))

def create(spec, config):
    model = Model(spec, config)
    exec(os.environ["ODD_CREATE"])
    return model

REGISTRATION = Registration("odd", None, None, create)
"""
STEP = StepBatch(
    token_ids=np.array([1], np.int64),
    positions=np.array([0], np.int64),
    past_lengths=np.array([0], np.int32),
    starts=np.array([0, 1], np.int32),
    block_ids=np.array([0], np.int32),
    block_starts=np.array([0, 1], np.int32),
    logits_rows=np.array([0], np.int64),
)


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """Makes a model of a backend that does this in `create` and in `step`, in a process of its own; closed behind the test."""
    site = tmp_path / "site"
    (site / "odd-1.dist-info").mkdir(parents=True)
    (site / "odd.py").write_text(_ODD)
    (site / "odd-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (site / "odd-1.dist-info" / "entry_points.txt").write_text("[penstock.backends]\nodd = odd:REGISTRATION\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
    spec = write_checkpoint(tmp_path / "model", CONFIGS["llama"])
    made = []

    def make(*, create="pass", step="pass"):
        monkeypatch.setenv("ODD_CREATE", create)
        monkeypatch.setenv("ODD_STEP", step)
        made.append(model.ModelApart("odd", spec, DeviceConfig(max_batch_tokens=8)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        ("ModelLost('odd: the device fell off the bus')", ModelLost, "odd: the device fell off the bus"),
        ("Short('too few')", ValueError, "backend odd raised in step: Short: too few"),
        ("ModelLost", ModelLost, "backend odd: ModelLost"),
        ("KeyError", RuntimeError, "backend odd raised in step: KeyError"),
        ("Mute", RuntimeError, "backend odd raised in step: Mute: its text raises TypeError"),
        ("OSError('no file b\\udcff')", RuntimeError, "backend odd raised in step: OSError: no file b?"),
        ("OSError('a\\n  b' + 'c' * 5000)", RuntimeError, f"backend odd raised in step: OSError: a b{'c' * 988} …"),
    ],
)
def test_what_a_step_raises_arrives_as_the_contract_has_it(odd, raised, kind, text):
    with pytest.raises(kind) as told:
        odd(step=f"raise {raised}").step(STEP)
    assert (type(told.value), str(told.value)) == (kind, text)


@pytest.mark.parametrize(
    ("create", "text"),
    [
        ("raise StartError('dtype: int4 is not there')", "backend odd: dtype: int4 is not there"),
        ("model.kv = None", "odd made a model that is not what it said: kv: must be a KvSpec, and is a NoneType"),
        ("model.kv = replace(model.kv, blocks=np.int64(7))", "kv.blocks: must be a whole number from 1, and is np.int64(7)"),
        (
            "model.kv = replace(model.kv, blocks=1 << 40)",
            "kv.blocks: must be at most 2147483648, since a batch names blocks as int32",
        ),
        ("model.kv = replace(model.kv, layout=3)", "kv.layout: must be text, and is 3"),
        ("model.device = np.int64(0)", "TypeError: Object of type int64 is not JSON serializable"),
    ],
)
def test_a_start_that_fails_says_why(odd, create, text):
    with pytest.raises(StartError) as told:
        odd(create=create)
    assert text in str(told.value)


def test_kv_of_a_type_that_does_not_travel_costs_a_transfer_and_no_model(odd):
    lives = odd(step="raise Short('lives')")
    with pytest.raises(ValueError, match=r"odd raised in export_kv: ValueError: data: an array of float64 \[1, 2, 3, 1, 4\]"):
        lives.export_kv([0], range(3))
    with pytest.raises(ValueError, match="lives"):
        lives.step(STEP)


def test_a_reason_is_one_line():
    def fails():
        raise OSError("no such device\n\n" + "trace\n" * 1000)

    availability, _ = answer_of(Source("odd", "odd 1", fails), None, lambda _: None)
    assert isinstance(availability, Broken)
    assert availability.reason.startswith("import failed: OSError: no such device trace trace")
    assert "\n" not in availability.reason
    assert len(availability.reason) < 1100
