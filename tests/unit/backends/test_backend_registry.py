"""Which backends there are, which one runs a model, and why the others do not."""

import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import Available, Broken, Capabilities, DType, Registration, Unavailable, Unsupported
from penstock.backends.discovery import Source
from penstock.backends.inspection import inspect
from penstock.backends.ranking import Speed, Verdict, rivals
from penstock.backends.registry import AUTO, DuplicateBackend, NoBackend, backends, describe, select, sources, standings


@dataclass(frozen=True)
class Plugin:
    """An entry point."""

    name: str
    load: object
    value: str = "somewhere:REGISTRATION"
    dist: object = None


def registration(name, availability=None, capabilities=None):
    availability = availability or Available(("cpu",), "1")
    capabilities = capabilities or Capabilities(dtypes=(DType.F32,))
    return Registration(name, lambda: availability, lambda _: capabilities, lambda spec, config: None)


def among(*registrations):
    return {r.name: Source(r.name, "", lambda r=r: r) for r in registrations}


@pytest.fixture
def spec(checkpoint):
    return read_model(checkpoint, "m")


def test_built_in_backends_are_there():
    assert list(sources([])) == ["openvino", "onnxruntime", "torch", "tensorrt", "fake"]


def test_a_plugin_is_found_by_its_entry_point():
    mine = registration("mine")
    assert backends(sources([Plugin("mine", lambda: mine)]))["mine"] is mine


@pytest.mark.parametrize("name", ["mine", "torch"])
def test_a_name_taken_twice_is_refused(name):
    plugins = [Plugin(name, lambda: registration(name))] * 2
    with pytest.raises(DuplicateBackend, match=rf"{name}.*somewhere:REGISTRATION"):
        sources(plugins)


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
    found = {**sources([]), "mine": Source("mine", "", load)}
    answer = describe(among=found)[-1].availability
    assert isinstance(answer, Broken)
    assert reason in answer.reason
    assert select(spec, among=found).registration.name != "mine"
    with pytest.raises(NoBackend, match="mine: broken"):
        select(spec, "mine", among=found)


def test_auto_takes_the_first_on_the_same_kind_of_device(spec):
    assert select(spec, AUTO, among=among(registration("one"), registration("two"))).registration.name == "one"


def test_auto_prefers_an_accelerator(spec):
    gpu = registration("two", Available(("cuda:0", "cpu"), "1"))
    assert select(spec, AUTO, among=among(registration("one"), gpu)).registration.name == "two"


def test_auto_goes_on_to_the_next_that_can(spec):
    found = among(
        registration("one", Unavailable("no library")),
        registration("two", capabilities=Unsupported("no sliding window")),
        registration("three"),
    )
    assert select(spec, AUTO, among=found).registration.name == "three"


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
    assert select(spec, "fake", among=only).registration.name == "fake"


def test_an_unknown_name_tells_the_known_ones(spec):
    with pytest.raises(NoBackend, match="no backend cuda; there are openvino, onnxruntime, torch, tensorrt, fake"):
        select(spec, "cuda", among=sources([]))


def test_the_table_tells_what_each_can_or_why_not(spec):
    found = among(registration("one"), registration("two", Unavailable("no library")))
    one, two = describe(spec, among=found)
    assert (one.name, one.capabilities) == ("one", Capabilities(dtypes=(DType.F32,)))
    assert (two.name, two.availability, two.capabilities) == ("two", Unavailable("no library"), None)
    assert describe(among=found)[0].capabilities is None


def test_looking_for_backends_imports_nothing_heavy():
    code = "import sys; from penstock.backends.registry import describe; describe(); print([m for m in ('torch', 'openvino', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_cpu_runs_openvino_and_an_accelerator_torch(spec):
    accelerated = sources([])["torch"].registration().probe().devices[0] != "cpu"
    assert select(spec, among=sources([])).registration.name == ("torch" if accelerated else "openvino")


def fast(prefill):
    return Speed(prefill=prefill, decode=10.0, alone=5.0, batch=8, seconds=1 / prefill)


def verdicts(spec, found, measured):
    return {s.report.name: s.verdict for s in standings(spec, among=found, speeds=lambda report, _: measured.get(report.name))}


def test_the_faster_of_two_that_were_measured_is_taken(spec):
    found = among(registration("one"), registration("two"), registration("three"))
    measured = {"one": fast(10), "two": fast(20)}
    chosen = select(spec, among=found, speeds=lambda report, _: measured.get(report.name))
    assert chosen.registration.name == "two"
    one = next(s for s in chosen.standings if s.report.name == "one")
    assert one.verdict is Verdict.SLOWER
    assert "two is 2.00 times as fast: prefill 20 tokens/s" in one.reason
    assert verdicts(spec, found, measured)["three"] is Verdict.BEHIND


def test_one_measurement_alone_moves_nothing(spec):
    found = among(registration("one"), registration("two"))
    assert verdicts(spec, found, {"two": fast(1e9)}) == {"one": Verdict.CHOSEN, "two": Verdict.BEHIND}


def test_a_fast_cpu_does_not_beat_an_accelerator(spec):
    found = among(registration("one"), registration("two", Available(("cuda:0",), "1")))
    assert verdicts(spec, found, {"one": fast(9), "two": fast(1)})["two"] is Verdict.CHOSEN


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"dtypes": ("fp4",)}, "dtypes: must be a tuple of DType"),
        ({"dtypes": ()}, "dtypes: must be"),
        ({"dtypes": DType.F32}, "dtypes: must be a tuple"),
        ({"max_context": -1}, "max_context: must be a whole number from 1, or None, and is -1"),
        ({"max_batch_size": 2.5}, "max_batch_size: must be a whole number"),
        ({"prefix_cache": "yes"}, "prefix_cache: must be True or False, and is 'yes'"),
        ({"weight_bytes": {DType.F32: -5}}, "weight_bytes: must be whole numbers from 1"),
        ({"tasks": ("chat",)}, "tasks: must be a tuple of Task"),
        ({"yields": {DType.F32: ""}}, "yields: must be reasons by DType"),
        ({"yields": ["f32"]}, "yields: must be reasons by DType"),
    ],
)
def test_nonsense_capabilities_are_broken_and_say_which(spec, told, reason):
    found = among(registration("odd", capabilities=Capabilities(**{"dtypes": (DType.F32,)} | told)), registration("one"))
    odd = standings(spec, among=found)[0]
    assert odd.verdict is Verdict.BROKEN
    assert reason in odd.reason
    assert select(spec, among=found).registration.name == "one"


def test_a_built_in_backend_that_raises_or_hangs_is_named_with_its_stage(spec):
    release = threading.Event()

    def raises():
        raise OSError("no such device")

    hanging = Registration("slow", release.wait, lambda _: None, lambda spec, config: None)
    raising = Registration("bad", raises, lambda _: None, lambda spec, config: None)
    bad, slow = inspect(among(raising, hanging).values(), spec, seconds=0.2)
    release.set()
    assert bad.availability == Broken("raised OSError: no such device")
    assert slow.availability == Broken("hangs in probe: no answer within 0.2 s")


def test_auto_passes_over_what_has_not_the_kv_cache_that_is_asked_for(spec):
    small = registration("two", capabilities=Capabilities(dtypes=(DType.F32,), kv_dtypes=(DType.INT8,)))
    selection = select(spec, kv_dtype=DType.INT8, among=among(registration("one"), small))
    assert selection.registration.name == "two"
    one = selection.standings[0]
    assert (one.verdict, one.reason) == (Verdict.UNSUPPORTED, "has no KV cache of int8; leave kv_cache_dtype auto")
    assert select(spec, among=among(registration("one"), small)).registration.name == "one"


def yielding(name, device="cpu"):
    can = Capabilities(dtypes=(DType.F32, DType.INT4), yields={DType.INT4: "has slow products of int4"})
    return registration(name, Available((device,), "1"), can)


def plain(name, device="cpu"):
    return registration(name, Available((device,), "1"), Capabilities(dtypes=(DType.F32, DType.INT4)))


def test_one_that_yields_leaves_any_other_the_way_until_both_were_measured(spec):
    found = among(yielding("one"), plain("two"))
    assert select(spec, among=found).registration.name == "one"
    assert select(spec, dtype=DType.INT4, among=found).registration.name == "two"
    one = select(spec, dtype=DType.INT4, among=found).standings[0]
    assert one.verdict is Verdict.BEHIND
    assert one.reason.startswith("has slow products of int4: two goes before it as long as two and one were not measured")
    measured = {"one": fast(9), "two": fast(1)}
    assert select(spec, dtype=DType.INT4, among=found, speeds=lambda report, _: measured[report.name]).registration.name == "one"


def test_where_all_yield_the_standing_order_holds(spec):
    assert select(spec, dtype=DType.INT4, among=among(yielding("one"), yielding("two"))).registration.name == "one"


def test_an_accelerator_that_yields_goes_before_no_other_but_before_processors(spec):
    found = among(plain("cpu"), yielding("untried", "cuda:0"), plain("gpu", "cuda:0"))
    assert select(spec, dtype=DType.INT4, among=found).registration.name == "gpu"
    assert select(spec, dtype=DType.INT4, among=among(plain("cpu"), yielding("untried", "cuda:0"))).registration.name == "untried"


def test_speed_decides_between_those_on_accelerators_or_else_all(spec):
    def names(*registrations):
        return [s.report.name for s in rivals(standings(spec, among=among(*registrations)))]

    cpus = registration("one"), registration("two")
    gone = registration("gone", Unavailable("no library"))
    gpus = registration("gpu", Available(("cuda:0",), "1")), registration("npu", Available(("npu:0",), "1"))
    assert names(*cpus, gone) == ["one", "two"]
    assert names(*cpus, gone, *gpus) == ["gpu", "npu"]


def reasons(spec, found, measured):
    return {s.report.name: s.reason for s in standings(spec, among=found, speeds=lambda report, _: measured.get(report.name))}


def test_what_was_not_measured_says_how_to_measure_it(spec):
    found = among(registration("one"), registration("two"))
    assert reasons(spec, found, {"one": fast(10)})["two"] == (
        "one goes before it as long as two was not measured with this model here; `penstock calibrate` does that"
    )
    assert reasons(spec, found, {})["two"].endswith(
        "one and two were not measured with this model here; `penstock calibrate` does that"
    )


def test_the_chosen_one_says_what_made_it_the_choice(spec):
    gpu = registration("gpu", Available(("cuda:0",), "1"))
    two = among(registration("one"), registration("two"))
    told = "measured with this model here: prefill 10 tokens/s, decode 5 tokens/s, 10 at batch 8 in f32"
    assert reasons(spec, two, {"one": fast(10)})["one"] == told
    assert reasons(spec, two, {})["one"].startswith("comes first as long as it was not measured")
    assert reasons(spec, among(registration("one")), {})["one"] == "no other one can"
    assert reasons(spec, among(registration("one"), gpu), {})["gpu"] == "has an accelerator"
