"""Every backend found on this machine against the suite that ships with the package, and against one another."""

from itertools import permutations

import pytest
from conforming import CASES

from penstock.backends.architectures.families import FAMILIES
from penstock.backends.checkpoint import read_model
from penstock.backends.conformance import CHECKS, PAIR_CHECKS, NotApplicable, Pair, subjects
from penstock.backends.conformance.checkpoints import CONFIGS
from penstock.backends.conformance.suite import make_subject
from penstock.backends.contract import Available, Broken, DType, Unsupported
from penstock.backends.registry import backends
from penstock.common.sources import resolve

FOUND = [name for name, registration in backends().items() if isinstance(registration.probe(), Available)]
REAL = [name for name in FOUND if name != "fake"]  # the fake one's answers are no model's
PAIRS = list(permutations(REAL, 2))
REDUCED = [DType.BF16, DType.INT8, DType.INT4]


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("conformance"), {}

    def get(backend, family, dtype=None, kv_dtype=None):
        key = backend, family, dtype, kv_dtype
        if key not in made:
            (made[key],) = subjects(backends()[backend], folder, families=(family,), dtype=dtype, kv_dtype=kv_dtype)
        if isinstance(made[key], Unsupported):
            pytest.skip(f"{backend}: {made[key].reason}")
        return made[key]

    return get


def hold(check, subject):
    try:
        check(subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


def test_no_built_in_backend_is_broken():
    assert {name: r.probe() for name, r in backends().items() if isinstance(r.probe(), Broken)} == {}


def test_every_family_has_a_model_in_the_suite():
    assert {config["architectures"][0] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(("family", "check"), CASES)
@pytest.mark.parametrize("backend", FOUND)
def test_it_conforms(backend, family, check, subject_of):
    hold(CHECKS[check], subject_of(backend, family))


IN_A_SHORTER_TYPE = [
    "prompt_agrees_with_the_formulas",
    "logprobs_agree_with_the_formulas",
    "mixed_batch_agrees_with_each_alone",
    "exported_kv_is_canonical",
    "imported_kv_is_used",
    "kv_travels_in_every_type",
    "closed_models_leave_nothing",
]


@pytest.mark.parametrize("check", IN_A_SHORTER_TYPE)
@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("backend", REAL)
def test_it_conforms_in_a_shorter_type(backend, dtype, check, subject_of):
    hold(CHECKS[check], subject_of(backend, "qwen3", dtype))


IN_A_SHORTER_CACHE = [
    "decoding_agrees_with_the_formulas",
    "chunks_agree_with_the_whole",
    "mixed_batch_agrees_with_each_alone",
    "preempted_sequences_are_replayed",
    "cached_prefixes_stay_as_they_are",
    "exported_kv_is_canonical",
    "exported_kv_is_a_copy",
    "imported_kv_is_used",
    "kv_travels_in_every_type",
    "wrong_transfers_are_refused",
    "native_blocks_are_used",
    "it_keeps_within_its_memory",
]


@pytest.mark.parametrize("check", IN_A_SHORTER_CACHE)
@pytest.mark.parametrize("backend", REAL)
def test_it_conforms_with_a_cache_of_fewer_bits(backend, check, subject_of):
    hold(CHECKS[check], subject_of(backend, "qwen3", DType.F32, DType.INT8))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_cache_of_fewer_bits_serves_one_of_more(source, target, subject_of):
    hold(
        PAIR_CHECKS["kv_serves_the_other"],
        Pair(subject_of(source, "qwen3", DType.F32, DType.INT8), subject_of(target, "qwen3", DType.F32)),
    )
    hold(
        PAIR_CHECKS["kv_serves_the_other"],
        Pair(subject_of(target, "qwen3", DType.F32), subject_of(source, "qwen3", DType.F32, DType.INT8)),
    )


# What does not differ between families either.
COPIES = {"kv_arrives_as_it_was", "blocks_serve_the_other"}


@pytest.mark.parametrize(("family", "check"), [(f, c) for f in CONFIGS for c in PAIR_CHECKS if f == "qwen3" or c not in COPIES])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_backends_agree_and_exchange_kv(source, target, family, check, subject_of):
    hold(PAIR_CHECKS[check], Pair(subject_of(source, family, DType.F32), subject_of(target, family, DType.F32)))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_built_in_model_answers_the_same_apart(source, target):
    spec = read_model(resolve("builtin"), "builtin")
    made = [make_subject(backends()[name], spec, spec, DType.F32) for name in (source, target)]
    PAIR_CHECKS["answers_are_the_same_apart"](Pair(*made))


@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_backends_exchange_kv_in_a_shorter_type(source, target, dtype, subject_of):
    pair = Pair(subject_of(source, "qwen3", dtype), subject_of(target, "qwen3", dtype))
    hold(PAIR_CHECKS["kv_serves_the_other"], pair)
    hold(PAIR_CHECKS["kv_arrives_as_it_was"], pair)
