"""The suite itself: it passes what is right, and each check catches a backend that is wrong in the way it is about."""

import json
import os
import re
import threading
from dataclasses import replace

import numpy_backend
import pytest
import wrong_backends as wrong

from penstock.backends.conformance import CHECKS, PAIR_CHECKS, Outcome, Pair, leaks, run, runner, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DType, Unavailable
from penstock.backends.fake import REGISTRATION as FAKE
from penstock.cli.app import app
from penstock.cli.conformance import conformance
from penstock.common.service import StartError

# For every check, the mutants that it has to catch.
CAUGHT = {
    "prompt_agrees_with_the_formulas": [wrong.TurnsNeighbours],
    "decoding_agrees_with_the_formulas": [wrong.DecodesOneTooFar, wrong.IgnoresThePast],
    "logprobs_agree_with_the_formulas": [wrong.SharpensLogits, wrong.DecodesOneTooFar],
    "chunks_agree_with_the_whole": [wrong.IgnoresThePastOfChunks, wrong.DecodesOneTooFar],
    "mixed_batch_agrees_with_each_alone": [wrong.ReadsTheFirstTable, wrong.OtherBitsInCompany],
    "only_wanted_rows_come_back": [wrong.TellsEveryRow],
    "logits_are_the_callers": [wrong.AddsToWhatItGaveOut],
    "top_logits_are_those_of_whole_rows": [
        wrong.TellsByLikelihood,
        wrong.RoundsWhatItTells,
        wrong.TellsNoRowWhole,
        wrong.GivesOtherRowsLater,
    ],
    "named_tokens_and_masses_are_those_of_whole_rows": [
        wrong.NamesAmongTheLikeliest,
        wrong.MixesUpTheNamed,
        wrong.WeighsTheNamedToo,
        wrong.WeighsAtOneTemperature,
    ],
    "top_logits_leave_the_same_behind": [wrong.ForgetsWhatItTold],
    "blocks_lie_anywhere": [wrong.BlocksInARow],
    "blocks_are_used_again": [wrong.AddsToBlocks, wrong.WritesBlocksOnce],
    "blocks_that_held_nan_are_used_again": [wrong.ClearsByMultiplying],
    "preempted_sequences_are_replayed": [wrong.AddsToBlocks, wrong.WritesBlocksOnce],
    "sequences_begin_with_cached_prefixes": [wrong.IgnoresThePastOfChunks, wrong.CopiesNothing, wrong.CopiesOneBlockAlone],
    "cached_prefixes_stay_as_they_are": [wrong.ClearsTheBlockBefore, wrong.MovesPrefixes],
    "prefixes_are_copied_as_far_as_they_are_there": [wrong.CopiesNothing, wrong.CopiesOneBlockAlone, wrong.CopiesWhateverIsAsked],
    "exported_kv_is_canonical": [wrong.SwapsKeysAndValues],
    "exported_kv_is_a_copy": [wrong.ExportsAView],
    "imported_kv_is_used": [wrong.ForgetsWhatItImports],
    "kv_travels_in_every_type": [wrong.TakesFloat32Alone, wrong.TakesAnyType, wrong.CutsHalvesOff, wrong.SaysAnotherType],
    "wrong_transfers_are_refused": [wrong.TakesWhatDoesNotFit],
    "native_blocks_are_used": [wrong.SendsBlocksOfZeros, wrong.SendsWholeBlocksAlone, wrong.SendsBlocksInRisingOrder],
    "native_blocks_are_copies": [wrong.SendsAViewOfBlocks, wrong.SendsBlocksInRisingOrder],
    "native_blocks_leave_others_alone": [wrong.WritesTheBlockBefore],
    "native_layout_names_the_form": [wrong.NamesEveryFormAlike, wrong.NamesTheSizeOfItsCache],
    "wrong_native_blocks_are_refused": [wrong.TakesBlocksAsTheyCome],
    "it_keeps_within_its_memory": [wrong.TakesTwiceTheMemory],
    "largest_batch_is_taken": [wrong.SevenAtMost],
    "longest_context_is_taken": [wrong.ShortSighted],
    "steps_beyond_the_limits_are_refused": [wrong.ChecksNoStep],
    "wrong_settings_are_refused": [wrong.HasEveryType],
    "closing_twice_is_harmless": [wrong.ClosesOnce, wrong.StepsWhenClosed],
    "failed_starts_hurt_nobody": [wrong.FailsForAll],
    "two_models_do_not_meet": [wrong.SharesItsCache],
    "eight_threads_share_a_model": [wrong.OfOneThread],
    "eight_models_run_at_once": [wrong.FourAtMost],
    "closed_models_leave_nothing": [wrong.KeepsItsCache, wrong.KeepsItsWeights, wrong.KeepsADescriptor, wrong.KeepsAThread],
    "failed_starts_leave_nothing": [wrong.KeepsWhatFailed, wrong.KeepsADescriptor],
}
CAUGHT_BY_ANOTHER = {
    "greedy_answers_are_the_same": [wrong.TurnsNeighbours, wrong.IgnoresThePast],
    "kv_serves_the_other": [wrong.SwapsKeysAndValues],
    "kv_serves_the_other_while_it_decodes": [wrong.ClearsForImports, wrong.ForgetsWhatItImports],
    "kv_arrives_as_it_was": [wrong.CutsHalvesOff],
    "answers_are_the_same_apart": [wrong.SwapsKeysAndValues, wrong.DecodesOneTooFar],
    "blocks_serve_the_other": [wrong.SendsValuesFirst],
}


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")

    def get(model=numpy_backend.NumpyModel, family="llama", **claims):
        (subject,) = subjects(numpy_backend.registration(model, **claims), folder, families=(family,))
        return subject

    return get


@pytest.fixture
def leftovers():
    """What mutants leave is taken away behind the test."""
    yield
    wrong.KeepsAThread.over.set()
    wrong.KeepsAThread.over = threading.Event()
    wrong.KeepsWhatFailed.kept.clear()
    wrong.SharesItsCache.caches.clear()
    while wrong.KeepsADescriptor.opened:
        os.close(wrong.KeepsADescriptor.opened.pop())


def cases(table):
    return [pytest.param(check, mutant, id=f"{check}-{mutant.__name__}") for check, mutants in table.items() for mutant in mutants]


OF_COPIES = [
    "sequences_begin_with_cached_prefixes",
    "cached_prefixes_stay_as_they_are",
    "prefixes_are_copied_as_far_as_they_are_there",
]


@pytest.mark.parametrize("check", [check for check in CHECKS if check != OF_COPIES[-1]])
def test_a_right_backend_passes(check, subject_of):
    CHECKS[check](subject_of(batch_invariant=False))


@pytest.mark.parametrize("check", [*OF_COPIES, "native_blocks_leave_others_alone"])
def test_a_right_backend_that_copies_prefixes_passes(check, subject_of):
    CHECKS[check](subject_of(numpy_backend.CopiesPrefixes))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_right_backend_passes_for_every_family(family, subject_of):
    for check in ("prompt_agrees_with_the_formulas", "decoding_agrees_with_the_formulas", "exported_kv_is_canonical"):
        CHECKS[check](subject_of(family=family))


def test_every_check_has_something_to_catch():
    assert CAUGHT.keys() == CHECKS.keys()
    assert CAUGHT_BY_ANOTHER.keys() == PAIR_CHECKS.keys()


@pytest.mark.parametrize(("check", "mutant"), cases(CAUGHT))
@pytest.mark.usefixtures("leftovers")
def test_a_wrong_backend_is_caught(check, mutant, subject_of, monkeypatch):
    monkeypatch.setattr(leaks, "_CYCLES", 2)  # the others are for what stays of right ones by chance
    subject = subject_of(mutant, batch_invariant=mutant is wrong.OtherBitsInCompany)
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):  # the last two: of the mutant's own, which the runner tells
        CHECKS[check](subject)


@pytest.mark.parametrize("check", PAIR_CHECKS)
def test_right_backends_agree(check, subject_of):
    PAIR_CHECKS[check](Pair(subject_of(), subject_of()))


@pytest.mark.parametrize(("check", "mutant"), cases(CAUGHT_BY_ANOTHER))
def test_a_wrong_backend_is_caught_by_another(check, mutant, subject_of):
    with pytest.raises(AssertionError):
        PAIR_CHECKS[check](Pair(subject_of(), subject_of(mutant)))


@pytest.fixture
def known(monkeypatch):
    """Backends by name, to be added to: those that the command knows."""
    known = {"numpy": numpy_backend.registration()}
    monkeypatch.setattr(runner, "backends", lambda: known)
    return known


FEW = ["chunks_agree_with_the_whole", "imported_kv_is_used", "closing_twice_is_harmless"]


def table(capsys):
    """Lines of what was printed, in cells; the line of the sums comes last."""
    *lines, sums = capsys.readouterr().out.splitlines()
    return [line.split() for line in lines[1:]], sums


def test_the_command_tells_every_check_of_every_family(known, capsys):
    assert conformance("numpy", check=FEW) == 0
    rows, sums = table(capsys)
    assert [row[:4] for row in rows] == [[f, "f32", c, "passed"] for f in CONFIGS for c in CHECKS if c in FEW]
    assert sums == "12 passed"


def test_flags_choose_backend_type_and_checks(known, capsys):
    words = ["conformance", "numpy", "--dtype", "f32", "--against", "numpy", "--check", FEW[2], "--check", "kv_serves_the_other"]
    assert app(words, result_action="return_value") == 0
    rows, sums = table(capsys)
    assert {row[2] for row in rows} == {FEW[2], "kv_serves_the_other"}
    assert sums == "12 passed"


def test_what_failed_has_its_reason_and_the_command_fails(known, capsys):
    known["numpy"] = numpy_backend.registration(wrong.IgnoresThePastOfChunks, import_kv=False)
    assert conformance("numpy", check=FEW, as_json=True) == 1
    results = {r["check"]: r for r in json.loads(capsys.readouterr().out) if r["model"] == "llama"}
    assert [results[check]["outcome"] for check in FEW] == ["failed", "skipped", "passed"]
    assert "chunks of 1" not in results[FEW[0]]["reason"]  # one token at a time it is right
    assert "chunks of 3: row" in results[FEW[0]]["reason"]
    assert results[FEW[1]]["reason"] == "it imports no KV"
    assert results[FEW[2]]["reason"] == ""


def test_what_a_backend_raises_is_its_failure_and_the_others_run(known):
    def create(spec, config):
        raise KeyError("no such weight")

    known["numpy"] = numpy_backend.registration(create)
    told = list(run("numpy", checks=tuple(FEW)))
    assert {(r.outcome, r.reason) for r in told} == {(Outcome.FAILED, "KeyError: 'no such weight'")}
    assert len(told) == len(FEW) * len(CONFIGS)


def test_two_backends_are_held_against_each_other_both_ways(known):
    known["swapping"] = replace(numpy_backend.registration(wrong.SwapsKeysAndValues), name="swapping")
    told = [r for r in run("numpy", against="swapping", checks=("kv_serves_the_other",)) if r.model == "qwen3"]
    assert [r.check for r in told] == ["kv_serves_the_other (numpy to swapping)", "kv_serves_the_other (swapping to numpy)"]
    assert [r.outcome for r in told] == [Outcome.FAILED, Outcome.FAILED]


def test_a_checkpoint_of_ones_own_is_taken(known, tmp_path):
    write_checkpoint(tmp_path / "mine", {**CONFIGS["qwen2"], "num_hidden_layers": 3, "vocab_size": 500}, seed=5)
    told = list(run("numpy", model=str(tmp_path / "mine"), dtype=DType.F32))
    assert {r.model for r in told} == {"mine"}
    assert [r.check for r in told if r.outcome is not Outcome.PASSED] == OF_COPIES[-1:]
    assert [r.check for r in told] == list(CHECKS)


def test_the_built_in_model_is_taken_by_its_name(known):
    known["fake"] = FAKE
    told = list(run("fake", model="builtin", checks=(FEW[0],)))
    assert [(r.model, r.outcome) for r in told] == [("builtin", Outcome.PASSED)]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"name": "numpie"}, "no backend numpie; there are numpy, absent"),
        ({"name": "absent"}, "absent does not run here: no such device"),
        ({"name": "numpy", "against": "absent"}, "absent does not run here"),
        ({"name": "numpy", "checks": ("chunky",)}, "no check chunky; there are chunks_agree"),
        ({"name": "numpy", "checks": ("kv_serves_the_other",)}, "compares two backends"),
        ({"name": "numpy", "dtype": DType.INT4}, "has no int4 for llama, but f32"),
        ({"name": "numpy", "model": "./nothing"}, "no folder ./nothing"),
    ],
)
def test_what_can_not_be_run_is_refused(known, asked, named):
    known["absent"] = replace(numpy_backend.registration(), probe=lambda: Unavailable("no such device"))
    with pytest.raises(StartError, match=re.escape(named)):
        list(run(**asked))
