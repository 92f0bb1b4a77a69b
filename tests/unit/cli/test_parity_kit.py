"""The parity kit passes clusters that answer alike, and finds every way in which one of them may not."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from penstock.cli.app import app
from penstock.cli.parity import command
from penstock.cli.parity.checks import CHECKS
from penstock.cli.parity.compare import Measure, differences
from penstock.cli.parity.runner import Outcome, Report, run
from penstock.client import (
    Alternative,
    Choice,
    Closing,
    Fallback,
    Finish,
    FinishReason,
    Handoff,
    InvalidRequest,
    Model,
    ModelExecutor,
    Result,
    TokenLogprob,
    Unavailable,
    Usage,
)
from penstock.common.config import ConfigError

BLOCK = 16


def place(token, shift=0.0):
    return TokenLogprob(
        token, -1.5 + shift, b"t", 2, (Alternative(token + 1, -0.5 + shift, b"u"), Alternative(token, -1.5 + shift, b"t"))
    )


class Cluster:
    """Answers by rule: a token is a hash of what stands before it and of all options that change what is drawn."""

    def __init__(self, *, apart, mutate=lambda result: result):
        self.apart = apart
        self.mutate = mutate
        self.cached = set()
        executor = ModelExecutor("e", "rule", "cpu", "f32", 0, 0, 9, 9, draining=False, features=("prefix_cache",))
        self.model = Model("m", "f", "llama", 2048, 500, (executor,), None)

    def models(self):
        return [self.model]

    def chat(self, messages, **options):
        return self.generate("".join(message.content for message in messages), **options)

    def generate(self, prompt, **options):
        return SimpleNamespace(result=lambda: self.mutate(self._answer(prompt, options)))

    def _answer(self, prompt, o):
        ids = [ord(c) for c in prompt] if isinstance(prompt, str) else list(prompt)
        drawing = (
            o["temperature"],
            o.get("seed") if o["temperature"] else 0,
            o.get("repetition_penalty"),
            o.get("frequency_penalty"),
        )
        choices = tuple(self._choice(i, ids, drawing, o) for i in range(o.get("n", 1)))
        blocks = [(o["cache_salt"], tuple(ids[:end])) for end in range(BLOCK, len(ids), BLOCK)]
        found = sum(block in self.cached for block in blocks) * BLOCK
        self.cached.update(blocks)
        return Result(choices, self._closing(len(ids), sum(len(c.token_ids) for c in choices), found))

    def _choice(self, index, ids, drawing, o):
        told = []
        finish = Finish(FinishReason.LENGTH)
        for _ in range(o["max_tokens"]):
            told.append(hash((tuple(ids), len(told), index, drawing, tuple(o.get("logit_bias", {}).items()))) % 400 + 50)
            if told[-1] in o.get("stop_token_ids", ()) and len(told) > o.get("min_tokens", 0):
                finish = Finish(FinishReason.STOP, stop_token_id=told[-1])
                break
        text = "".join(map(chr, told))
        for stop in o.get("stop", ()):
            if stop in text:
                end = text.index(stop)
                finish = Finish(FinishReason.STOP_SEQUENCE, stop_text=stop)
                told, text = told[: end + len(stop)], text[: end + len(stop) * o["include_stop_text"]]
        logprobs = tuple(map(place, told)) if "logprobs" in o else ()
        prompt_logprobs = tuple(map(place, ids[1:])) if "prompt_logprobs" in o else ()
        return Choice(index, text, tuple(told), logprobs, prompt_logprobs, finish)

    def _closing(self, prompt_tokens, tokens, cached):
        closing = Closing(Usage(prompt_tokens, tokens, cached), "r", "m", (), 0, 0, 0, 0, 0, 0, 0, "a", "a", fallback=Fallback.NONE)
        if not self.apart or tokens < 2:
            return closing
        return replace(closing, decode_executor_id="b", handoff=Handoff(4096, 0.1, 0.1, "grpc", native=True))


def told(reports):
    return {report.check: report for report in reports}


def reports(together, apart, tolerance=0.0, checks=(), *, rounded=False):
    return told(run(together, apart, model=None, tolerance=tolerance, rounded=rounded, checks=checks))


def test_clusters_that_answer_alike_pass_every_check():
    found = reports(Cluster(apart=False), Cluster(apart=True))
    assert list(found) == ["model", *CHECKS]
    assert {report.outcome for report in found.values()} == {Outcome.PASSED}, found
    assert all(report.requests and report.tokens and report.apart for name, report in found.items() if name != "model")
    assert found["greedy"].kv_bytes == {"grpc": 4 * 4096}
    assert found["greedy"].native == 4
    assert all(report.alike == report.tokens for report in found.values())


def of_choices(change):
    return lambda result: replace(result, choices=tuple(change(choice) for choice in result.choices))


def of_closing(**changes):
    return lambda result: replace(result, closing=replace(result.closing, **changes))


def shifted(choice):
    return replace(choice, logprobs=tuple(place(one.token_id, 1e-6) for one in choice.logprobs))


def more_cached(result):
    return replace(
        result, closing=replace(result.closing, usage=replace(result.usage, cached_tokens=result.usage.cached_tokens + BLOCK))
    )


MUTANTS = {
    "drops the last token": (of_choices(lambda c: replace(c, token_ids=c.token_ids[:-1])), {*CHECKS}),
    "doubles the first token": (of_choices(lambda c: replace(c, token_ids=c.token_ids[:1] + c.token_ids)), {*CHECKS}),
    "tells another text": (of_choices(lambda c: replace(c, text=c.text + "!")), {*CHECKS}),
    "stops for another reason": (of_choices(lambda c: replace(c, finish=Finish(FinishReason.STOP))), {*CHECKS}),
    "forgets a choice": (lambda r: replace(r, choices=r.choices[:1]), {"choices"}),
    "other log-probabilities": (of_choices(shifted), {"logprobs", "prompt_logprobs"}),
    "no log-probabilities": (of_choices(lambda c: replace(c, logprobs=())), {"logprobs", "prompt_logprobs"}),
    "no prompt log-probabilities": (of_choices(lambda c: replace(c, prompt_logprobs=())), {"prompt_logprobs"}),
    "other cached tokens": (more_cached, {*CHECKS}),
    "no handoff": (of_closing(handoff=None, decode_executor_id="a"), {*CHECKS}),
    "a handoff of nothing": (of_closing(handoff=Handoff(0, 0, 0, "grpc", native=True)), {*CHECKS}),
    "a handoff within one executor": (of_closing(decode_executor_id="a"), {*CHECKS}),
    "a fallback": (of_closing(fallback=Fallback.RECOMPUTE_ON_DECODE, fallback_reason="lease"), {*CHECKS}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_cluster_that_is_wrong_fails(name):
    mutate, checks = MUTANTS[name]
    found = reports(Cluster(apart=False), Cluster(apart=True, mutate=mutate))
    assert {check for check, report in found.items() if report.outcome is Outcome.FAILED} == checks


def test_a_together_cluster_that_hands_over_fails():
    found = reports(Cluster(apart=True), Cluster(apart=True))
    assert found["greedy"].why.startswith("request 1: together: ran on two executors: prefill a, decode b")


def test_another_version_of_the_model_fails():
    other = Cluster(apart=True)
    other.model = replace(other.model, fingerprint="g")
    assert reports(Cluster(apart=False), other)["model"].outcome is Outcome.FAILED


def test_a_cluster_that_fails_to_answer_fails_with_its_reason():
    def fail(result):
        raise Unavailable("no executor")

    found = reports(Cluster(apart=False), Cluster(apart=True, mutate=fail), checks=["greedy"])
    assert found["greedy"].why == "request 1: apart: Unavailable: no executor"


def test_what_neither_supports_is_skipped_and_what_one_refuses_fails():
    def refuse(result):
        raise InvalidRequest.field("reporting.logprobs", "not supported")

    both = reports(Cluster(apart=False, mutate=refuse), Cluster(apart=True, mutate=refuse), checks=["logprobs"])["logprobs"]
    assert (both.outcome, both.why) == (Outcome.SKIPPED, "reporting.logprobs: not supported")
    one = reports(Cluster(apart=False), Cluster(apart=True, mutate=refuse), checks=["logprobs"])["logprobs"]
    assert one.outcome is Outcome.FAILED


def test_a_tolerance_takes_what_lies_within_it_and_tells_how_far_it_was():
    apart = Cluster(apart=True, mutate=of_choices(shifted))
    found = reports(Cluster(apart=False), apart, tolerance=1e-5, checks=["logprobs"])["logprobs"]
    assert found.outcome is Outcome.PASSED
    assert found.logprob_difference == pytest.approx(1e-6)
    assert reports(Cluster(apart=False), apart, tolerance=1e-7, checks=["logprobs"])["logprobs"].outcome is Outcome.FAILED


def of_last(change):
    """Every answer with its last token changed, and all that stands with it as it was."""
    return of_choices(lambda c: replace(c, token_ids=(*c.token_ids[:-1], change), text=""))


def test_where_rounding_is_let_pass_tokens_may_differ_and_are_counted():
    apart = Cluster(apart=True, mutate=of_last(7))
    strict = reports(Cluster(apart=False), apart, checks=["prompt_lengths"])["prompt_lengths"]
    found = reports(Cluster(apart=False), apart, checks=["prompt_lengths"], rounded=True)["prompt_lengths"]
    assert (strict.outcome, found.outcome) == (Outcome.FAILED, Outcome.PASSED)
    assert found.alike == found.tokens - found.requests


@pytest.mark.parametrize("name", ["no handoff", "a fallback", "other cached tokens", "forgets a choice", "no log-probabilities"])
def test_what_rounding_does_not_excuse_fails_all_the_same(name):
    mutate, checks = MUTANTS[name]
    found = reports(Cluster(apart=False), Cluster(apart=True, mutate=mutate), rounded=True)
    assert {check for check, report in found.items() if report.outcome is Outcome.FAILED} == checks


def diverging(shift):
    """The second place tells of another token, and from there on nothing is comparable; `shift` is by how much the first two are off."""

    def change(choice):
        if len(choice.logprobs) < 2:
            return choice
        first, second = (place(one.token_id, shift) for one in choice.logprobs[:2])
        behind = tuple(place(one.token_id + 1, 3.0) for one in choice.logprobs[2:])
        other = replace(second, token_id=second.token_id + 1)
        ids = (choice.token_ids[0], other.token_id, *(one.token_id for one in behind))
        return replace(choice, token_ids=ids, logprobs=(first, other, *behind))

    return of_choices(change)


def test_where_rounding_is_let_pass_log_probabilities_are_bounded_up_to_the_first_other_token():
    near = reports(Cluster(apart=False), Cluster(apart=True, mutate=diverging(0.01)), 0.02, ["logprobs"], rounded=True)["logprobs"]
    assert near.outcome is Outcome.PASSED
    assert near.logprob_difference == pytest.approx(0.01)
    assert near.logprob_difference_mean == pytest.approx(0.01)
    far = reports(Cluster(apart=False), Cluster(apart=True, mutate=diverging(0.03)), 0.02, ["logprobs"], rounded=True)["logprobs"]
    assert (far.outcome, far.logprob_difference) == (Outcome.FAILED, pytest.approx(0.03))


def by_company(base):
    """Choices behind the first are drawn by how many there are, as on a backend that computes other bits beside others."""

    def mutate(result):
        first, *others = result.choices
        shifted = (replace(c, token_ids=tuple(t + base + len(result.choices) for t in c.token_ids)) for c in others)
        return replace(result, choices=(first, *shifted))

    return mutate


def test_what_differs_beside_others_is_undecided_where_one_cluster_alone_is_not_alike_either():
    moody = Cluster(apart=False, mutate=by_company(0))
    found = reports(moody, Cluster(apart=True, mutate=by_company(1)), checks=["choices"])["choices"]
    assert found.outcome is Outcome.SKIPPED
    assert found.why.startswith("together answers otherwise too in other company; request 1: choice 1: tokens: ")
    steady = reports(Cluster(apart=False), Cluster(apart=True, mutate=by_company(1)), checks=["choices"])["choices"]
    assert steady.outcome is Outcome.FAILED


def test_what_is_undecided_excuses_no_request_that_ran_where_it_should_not():
    moody = Cluster(apart=False, mutate=by_company(0))
    lost = of_closing(fallback=Fallback.RECOMPUTE_ON_DECODE, fallback_reason="lease")
    both = Cluster(apart=True, mutate=lambda result: lost(by_company(1)(result)))
    assert reports(moody, both, checks=["choices"])["choices"].outcome is Outcome.FAILED


def test_not_a_number_is_within_no_tolerance():
    one = Cluster(apart=False).generate([1, 2], max_tokens=3, temperature=0.0, logprobs=1, cache_salt="").result()
    other = of_choices(lambda c: replace(c, logprobs=tuple(replace(p, logprob=float("nan")) for p in c.logprobs)))(one)
    assert any("nan" in what for what in differences(one, other, Measure(1.0, cached_tokens=True)))


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--tolerance", "-1"], "--tolerance: must be 0 or more"),
        (["--tolerance", "nan"], "--tolerance: must be 0 or more"),
        (["--check", "greed"], "--check: must be one of greedy, chat"),
    ],
)
def test_a_wrong_option_is_refused_before_a_cluster_is_asked(flags, why):
    with pytest.raises(ConfigError, match=why):
        app(["parity", "--together", "127.0.0.1:1", "--apart", "127.0.0.1:1", *flags], exit_on_error=False, print_error=False)


def test_the_command_tells_a_table_or_json_and_its_status(monkeypatch, capsys):
    clusters = {"127.0.0.1:1": Cluster(apart=False), "127.0.0.1:2": Cluster(apart=True)}

    class Connected:
        def __init__(self, connection):
            self.cluster = clusters[connection.address]

        def __enter__(self):
            return self.cluster

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(command, "connected", Connected)
    assert command.parity(together="127.0.0.1:1", apart="127.0.0.1:2") == 0
    shown = capsys.readouterr().out
    assert f"{1 + len(CHECKS)} passed" in shown
    assert "MiB by grpc" in shown
    assert command.parity(together="127.0.0.1:2", apart="127.0.0.1:1", check=["greedy"], as_json=True) == 1
    assert [(one["check"], one["outcome"]) for one in json.loads(capsys.readouterr().out)] == [
        ("model", "passed"),
        ("greedy", "failed"),
    ]


@pytest.mark.parametrize(
    ("reports", "doubt"),
    [
        ([Report("model", Outcome.PASSED), Report("greedy", Outcome.PASSED, requests=3, apart=2)], ""),
        ([Report("model", Outcome.PASSED), Report("greedy", Outcome.SKIPPED)], "refused every request"),
        ([Report("model", Outcome.PASSED), Report("greedy", Outcome.PASSED, requests=3)], "no KV was handed over"),
        ([Report("model", Outcome.FAILED), Report("greedy", Outcome.PASSED, requests=3, apart=3)], "1 of 2 checks failed"),
    ],
)
def test_only_what_was_checked_and_handed_over_is_taken_for_parity(reports, doubt):
    assert doubt in command._doubt(reports)
    assert bool(command._doubt(reports)) == bool(doubt)
