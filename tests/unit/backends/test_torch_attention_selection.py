"""Which way of attending is taken: the quickest of those that are right; and that a model computes the same by each of them."""

import time
from dataclasses import replace

import pytest
import structlog
import torch
from imitated_cuda import imitate

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance import CHECKS, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.pytorch import REGISTRATION
from penstock.backends.pytorch.attention.measured import quickest
from penstock.backends.pytorch.attention.paged import Paged
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.attention.sdpa import GatheredDecoding, SdpaPrefilling
from penstock.backends.pytorch.attention.selection import ON_PROCESSOR, Ways, choose
from penstock.backends.pytorch.model import TorchModel


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("m"), CONFIGS["mistral"]).decoder  # with a window


def timed(compute):
    compute()
    began = time.perf_counter()
    return compute(), time.perf_counter() - began


def telling(seconds):
    """A clock that has each computation take what its class is said to take."""

    def clock(compute):
        return compute(), seconds[type(compute.func.__self__).__name__]

    return clock


class Slower(GatheredDecoding):
    pass


class Wrong(GatheredDecoding):
    def attend(self, queries, cache):
        return super().attend(queries, cache.roll(1, 1))


class Absent(GatheredDecoding):
    def attend(self, queries, cache):
        raise RuntimeError("no kernel image is available\nfor this device")


def broken():
    raise ImportError("libtriton.so is damaged")


def pick(decoder, decoding, prefilling=None, clock=timed):
    ways = Ways(decoding, prefilling or {"masked": lambda: SdpaPrefilling.masked})
    with torch.inference_mode():
        return choose(decoder, torch.float32, 16, torch.device("cpu"), ways, clock, timed)


def test_the_quickest_is_taken(decoder):
    ways = {"slower": lambda: Slower, "gathered": lambda: GatheredDecoding}
    attention, (decodes, _) = pick(decoder, ways, clock=telling({"Slower": 2.0, "GatheredDecoding": 1.0}))
    assert attention.decoding is GatheredDecoding
    assert attention.names == ("gathered", "masked")
    assert [(trial.name, trial.seconds) for trial in decodes] == [("gathered", 3.0), ("slower", 6.0)]  # three cases
    attention, _ = pick(decoder, ways, clock=telling({"Slower": 1.0, "GatheredDecoding": 2.0}))
    assert attention.decoding is Slower


def test_what_raises_or_is_wrong_is_left_out_with_its_reason(decoder):
    ways = {"wrong": lambda: Wrong, "absent": lambda: Absent, "broken": broken, "gathered": lambda: GatheredDecoding}
    attention, (decodes, _) = pick(decoder, ways)
    assert attention.names[0] == "gathered"
    reasons = {trial.name: trial.reason for trial in decodes if trial.seconds is None}
    assert reasons.pop("wrong").startswith("it is off by ")
    assert reasons == {"absent": "RuntimeError: no kernel image is available", "broken": "ImportError: libtriton.so is damaged"}


def test_where_none_is_right_each_ones_reason_is_told(decoder):
    with pytest.raises(RuntimeError, match=r"no attention for decoding: .*absent: RuntimeError: no kernel .*wrong: it is off"):
        pick(decoder, {"absent": lambda: Absent, "wrong": lambda: Wrong})


def test_a_device_is_asked_for_all_ways_and_the_log_has_each(decoder, monkeypatch):
    imitate(monkeypatch)
    monkeypatch.setattr("penstock.backends.pytorch.timing._RUNS", 1)  # Triton's interpreter takes its time
    monkeypatch.setattr("penstock.backends.pytorch.attention.selection._DECODES", ((1, 20), (3, 9)))
    with structlog.testing.capture_logs() as logs:
        attention = quickest(replace(decoder, context_length=20), torch.float32, 16, torch.device("cpu"))
    (told,) = (entry for entry in logs if entry["event"] == "attention chosen")
    assert told["decoding"][0].startswith(f"{attention.names[0]}: ")
    assert told["prefill"][0].startswith(f"{attention.names[1]}: ")
    tried = {line.partition(":")[0] for line in told["decoding"] + told["prefill"] if line.endswith(" us")}
    assert tried == {"gathered", "masked", "repeated", "lower_right", "paged"}


def test_a_model_tells_how_it_attends(checkpoint):
    model = REGISTRATION.create(read_model(checkpoint, "m"), DeviceConfig(kv_cache_bytes=1 << 20, device="cpu"))
    assert model.ways == {"decode_attention": "gathered", "prefill_attention": "masked"}
    model.close()


PREFILLS = {
    "repeated": lambda window: Attention(GatheredDecoding, SdpaPrefilling.repeated, ("gathered", "repeated")),
    "lower_right": lambda window: Attention(GatheredDecoding, SdpaPrefilling.lower_right, ("gathered", "lower_right")),
    "paged": lambda window: Attention(Paged(window, 8).decoding, Paged(window, 8).prefilling, ("paged", "paged")),
}
"""Beside the processor's own, which the suite is held against with all other backends."""


PROMPT, CHUNKS, DECODING = "prompt_agrees_with_the_formulas", "chunks_agree_with_the_whole", "decoding_agrees_with_the_formulas"
CASES = [
    (family, name, check) for family in ("qwen3", "mistral") for name in ("repeated", "lower_right") for check in (PROMPT, CHUNKS)
]
CASES += [("qwen3", "paged", PROMPT), ("mistral", "paged", DECODING)]  # mistral has a window


@pytest.mark.parametrize(("family", "name", "check"), CASES)
def test_a_model_conforms_by_each_way(family, name, check, tmp_path):
    def create(spec, config):
        return TorchModel(spec, replace(config, device="cpu"), PREFILLS[name](spec.decoder.sliding_window))

    (subject,) = subjects(replace(REGISTRATION, create=create), tmp_path, families=(family,), dtype=DType.F32)
    CHECKS[check](subject)


def test_recorded_steps_attend_as_the_model_does(tmp_path):
    spec = read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m")
    asked = []
    attention = replace(ON_PROCESSOR, decoding=lambda *layout: asked.append(layout) or GatheredDecoding(*layout))
    model = TorchModel(spec, DeviceConfig(kv_cache_bytes=1 << 20, device="cpu", dtype=DType.F32), attention)
    model._graphs = model._record_by(lambda compute: compute)
    driver = Driver(model)
    driver.step(Piece(driver.sequence(), [1]))
    assert len(asked) == 1
    assert asked[0][1].shape == (1, 1)
    model.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_device_has_something_to_choose_from(dtype, decoder):
    kind = torch.float32 if dtype == DType.F32 else torch.bfloat16
    assert quickest(decoder, kind, 16, torch.device("cuda:0")).names[1] in {"masked", "repeated", "lower_right", "paged"}
