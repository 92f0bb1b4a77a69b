"""Every backend found on this machine against the suite that ships with the package, for every family."""

import pytest

from penstock.backends.architectures.families import FAMILIES
from penstock.backends.conformance import CHECKS, NotApplicable, subjects
from penstock.backends.conformance.checkpoints import CONFIGS
from penstock.backends.contract import Available, Broken, DType
from penstock.backends.registry import backends

FOUND = [name for name, registration in backends().items() if isinstance(registration.probe(), Available)]


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("conformance"), {}

    def get(backend, family, dtype=None):
        key = backend, family, dtype
        if key not in made:
            made[key] = next(subjects(backends()[backend], folder / f"{backend}-{family}", families=(family,), dtype=dtype), None)
        return made[key]

    return get


def test_no_built_in_backend_is_broken():
    assert {name: r.probe() for name, r in backends().items() if isinstance(r.probe(), Broken)} == {}


def test_every_family_has_a_model_in_the_suite():
    assert {config["architectures"][0] for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("backend", FOUND)
def test_it_conforms(backend, family, check, subject_of):
    subject = subject_of(backend, family)
    if subject is None:
        pytest.skip(f"{backend} does not run {family}")
    try:
        CHECKS[check](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


REDUCED = [DType.BF16, DType.INT8, DType.INT4]


@pytest.mark.parametrize("check", ["prompt_agrees_with_the_formulas", "mixed_batch_agrees_with_each_alone", "imported_kv_is_used"])
@pytest.mark.parametrize("dtype", REDUCED)
@pytest.mark.parametrize("backend", FOUND)
def test_it_conforms_in_a_shorter_type(backend, dtype, check, subject_of):
    subject = subject_of(backend, "qwen3", dtype)
    if subject is None or dtype not in subject.capabilities.dtypes:
        pytest.skip(f"{backend} has no {dtype}")
    try:
        CHECKS[check](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))
