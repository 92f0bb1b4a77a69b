"""Which backends there are, which one runs a model, and why the others do not."""

import subprocess
import sys
from dataclasses import dataclass

import pytest

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, Broken, Capabilities, DType, Registration, Unavailable, Unsupported
from penstock.backends.registry import AUTO, DuplicateBackend, NoBackend, backends, describe, select


@dataclass(frozen=True)
class Plugin:
    """An entry point."""

    name: str
    load: object
    value: str = "somewhere:REGISTRATION"


def registration(name, availability=None, capabilities=None):
    availability = availability or Available(("cpu",), "1")
    capabilities = capabilities or Capabilities(dtypes=(DType.F32,))
    return Registration(name, lambda: availability, lambda _: capabilities, lambda spec, config: None)


def among(*registrations):
    return {r.name: r for r in registrations}


@pytest.fixture
def spec(checkpoint):
    return read_model(checkpoint, "m")


def test_built_in_backends_are_there():
    assert list(backends([])) == ["openvino", "torch", "fake"]


def test_a_plugin_is_found_by_its_entry_point():
    mine = registration("mine")
    assert backends([Plugin("mine", lambda: mine)])["mine"] is mine


@pytest.mark.parametrize("name", ["mine", "torch"])
def test_a_name_taken_twice_is_refused(name):
    plugins = [Plugin(name, lambda: registration(name))] * 2
    with pytest.raises(DuplicateBackend, match=rf"{name}.*somewhere:REGISTRATION"):
        backends(plugins)


def raise_import_error():
    raise ImportError("libnpu.so.2 is missing")


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (raise_import_error, "ImportError: libnpu.so.2 is missing"),
        (lambda: "not a registration", "gives a str"),
        (lambda: registration("other"), "calls itself other"),
    ],
)
def test_a_plugin_that_fails_is_broken_and_hurts_no_other(load, reason, spec):
    found = backends([Plugin("mine", load)])
    answer = found["mine"].probe()
    assert isinstance(answer, Broken)
    assert reason in answer.reason
    assert select(spec, among=found)[0].name != "mine"
    with pytest.raises(NoBackend, match="mine: broken"):
        select(spec, "mine", among=found)


def test_auto_takes_the_first_on_the_same_kind_of_device(spec):
    assert select(spec, AUTO, among=among(registration("one"), registration("two")))[0].name == "one"


def test_auto_prefers_an_accelerator(spec):
    gpu = registration("two", Available(("cuda:0", "cpu"), "1"))
    assert select(spec, AUTO, among=among(registration("one"), gpu))[0].name == "two"


def test_auto_goes_on_to_the_next_that_can(spec):
    found = among(
        registration("one", Unavailable("no library")),
        registration("two", capabilities=Unsupported("no sliding window")),
        registration("three"),
    )
    assert select(spec, AUTO, among=found)[0].name == "three"


def test_every_reason_is_told(spec):
    found = among(
        registration("one", Unavailable("no library")),
        registration("two", Broken("driver too old")),
        registration("three", capabilities=Unsupported("no sliding window")),
        registration("four"),
    )
    with pytest.raises(NoBackend) as raised:
        select(spec, AUTO, DType.INT4, among=found)
    for reason in (
        "one: unavailable: no library",
        "two: broken: driver too old",
        "three: no sliding window",
        "four: has no int4 for it, but f32",
    ):
        assert reason in str(raised.value)


def test_made_up_answers_are_never_taken_by_themselves(spec):
    only = among(registration("fake"))
    with pytest.raises(NoBackend):
        select(spec, AUTO, among=only)
    assert select(spec, "fake", among=only)[0].name == "fake"


def test_an_unknown_name_tells_the_known_ones(spec):
    with pytest.raises(NoBackend, match="no backend cuda; there are openvino, torch, fake"):
        select(spec, "cuda", among=backends([]))


def test_the_table_tells_what_each_can_or_why_not(spec):
    found = among(registration("one"), registration("two", Unavailable("no library")))
    one, two = describe(spec, among=found)
    assert (one.name, one.capabilities) == ("one", Capabilities(dtypes=(DType.F32,)))
    assert (two.name, two.availability, two.capabilities) == ("two", Unavailable("no library"), None)
    assert describe(among=found)[0].capabilities is None


def test_looking_for_backends_imports_nothing_heavy():
    code = "import sys; from penstock.backends.registry import describe; describe(); print([m for m in ('torch', 'openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cpu_runs_openvino_and_an_accelerator_torch(spec):
    accelerated = backends([])["torch"].probe().devices[0] != "cpu"
    assert select(spec, among=backends([]))[0].name == ("torch" if accelerated else "openvino")
