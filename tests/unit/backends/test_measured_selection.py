"""What executors measured at their starts decides between backends, where it is of this model, machine and version."""

from dataclasses import replace
from importlib.metadata import version

import pytest

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, Capabilities, DType, Registration
from penstock.backends.discovery import Source
from penstock.backends.ranking import Verdict
from penstock.backends.registry import select
from penstock.backends.speed import kept_speeds
from penstock.common.calibrations import Calibrations, Key
from penstock.common.machine import machine
from penstock.common.step_times import Curve, StepTimes


@pytest.fixture
def spec(checkpoint):
    return read_model(checkpoint, "m")


def found(*names):
    def source(name):
        can = Capabilities(dtypes=(DType.F32,))
        return Source(name, "", lambda: Registration(name, lambda: Available(("cpu",), "7"), lambda _: can, lambda *_: None))

    return {name: source(name) for name in names}


def times(prefill, decode):
    """Tokens per second of prefill, and of decoding at batch 8."""
    return StepTimes(
        prefill=Curve((512,), (512 / prefill,)),
        prefill_pair_seconds=0.0,
        decode=Curve((8,), (8 / decode,)),
        decode_context=576,
        decode_token_seconds=0.0,
    )


def key(spec, backend, **other):
    known = Key(
        model=spec.fingerprint,
        backend=backend,
        backend_version="7",
        penstock=version("penstock"),
        dtype="f32",
        kv="any",
        device="cpu",
        threads=2,
        machine=machine(),
    )
    return replace(known, **other)


def chosen(spec, folder):
    return select(spec, among=found("one", "two"), speeds=kept_speeds(folder, spec.fingerprint, threads=2))


def test_the_faster_one_is_taken_and_the_figures_are_told(spec, tmp_path):
    kept = Calibrations(tmp_path)
    kept.write(key(spec, "one"), times(prefill=1000, decode=100))
    assert chosen(spec, tmp_path).registration.name == "one"
    kept.write(key(spec, "two"), times(prefill=2000, decode=200))
    selection = chosen(spec, tmp_path)
    assert selection.registration.name == "two"
    (one,) = (s for s in selection.standings if s.report.name == "one")
    assert one.verdict is Verdict.SLOWER
    assert one.reason == (
        "two is 2.00 times as fast: prefill 2,000 tokens/s, decode 25 tokens/s, 200 at batch 8 in f32; "
        "here prefill 1,000 tokens/s, decode 12 tokens/s, 100 at batch 8 in f32"
    )


@pytest.mark.parametrize(
    "other",
    [{"machine": "another"}, {"threads": 64}, {"penstock": "0.0"}, {"backend_version": "6"}, {"model": "x"}, {"dtype": "bf16"}],
)
def test_what_was_measured_of_something_else_decides_nothing(spec, tmp_path, other):
    kept = Calibrations(tmp_path)
    kept.write(key(spec, "one"), times(prefill=1000, decode=100))
    kept.write(key(spec, "two", **other), times(prefill=9000, decode=900))
    assert chosen(spec, tmp_path).registration.name == "one"
