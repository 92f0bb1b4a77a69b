"""Pools of a running cluster: they answer, grow, shrink and change roles, and nobody who is being answered notices."""

import json
import signal
import threading
import urllib.request
from collections import Counter

import psutil
import pytest
from suite import Suite, wait_for

from penstock.cli.app import app
from penstock.client import PenstockError
from penstock.common.config import ConfigError

PROMPTS = [f"Count from {n}: {n} {n + 1} {n + 2}" for n in (3, 17, 88, 300)]
OPTIONS = {"max_tokens": 32, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def suite():
    flags = (
        "--backend",
        "openvino",
        "--dtype",
        "f32",
        "--prefill",
        "1",
        "--decode",
        "1",
        "--threads",
        "2",
        "--healthy-seconds",
        "0",
    )
    with Suite("builtin", *flags, environment={"PENSTOCK_EXECUTOR_CALIBRATION_SECONDS": "0"}) as running:
        yield running
        assert running.stop() == 0


@pytest.fixture
def penstock(suite, capsys):
    """A command on the running cluster; what it prints."""

    def run(*arguments):
        app([*arguments, "--target", suite.grpc], exit_on_error=False, print_error=False, result_action="return_value")
        return capsys.readouterr().out

    return run


def executors(penstock):
    processes = json.loads(penstock("scale", "--json"))
    return {told["process"]: told for told in processes if told["role"]}


def roles(penstock):
    return Counter(told["role"] for told in executors(penstock).values())


class Load:
    """Streams that follow one another until it is left; it knows each of their texts beforehand."""

    def __init__(self, suite):
        self._client = suite.client()
        self._wanted = [self._client.generate(prompt, **OPTIONS).result().text for prompt in PROMPTS]
        self._ended = threading.Condition()
        self._counts = [0] * len(PROMPTS)
        self._leaving = False
        self.wrong = []
        self.handoffs = 0
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(PROMPTS))]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._leaving = True
        for thread in self._threads:
            thread.join()
        self._client.close()

    def wait_for_more(self):
        """Return when each stream has ended and another one after it, which has run in the present alone."""
        with self._ended:
            wanted = [count + 2 for count in self._counts]
            assert self._ended.wait_for(lambda: self.wrong or all(map(int.__ge__, self._counts, wanted)), timeout=120)

    def _run(self, i):
        while not self._leaving:
            handed_over = False
            try:
                # Cached for no other, or there would be nothing to hand over.
                result = self._client.generate(PROMPTS[i], **OPTIONS, cache_salt=f"{i} {self._counts[i]}").result()
                text, handed_over = result.text, result.closing.handoff is not None
            except PenstockError as error:
                text = error
            with self._ended:
                self._counts[i] += 1
                self.handoffs += handed_over
                if text != self._wanted[i]:
                    self.wrong.append(text)
                self._ended.notify_all()


def test_pools_answer_over_both_doors(suite, penstock):
    assert roles(penstock) == {"prefill": 1, "decode": 1}
    with suite.client() as client:
        text = client.generate(PROMPTS[0], **OPTIONS).result().text
    body = json.dumps({"model": "builtin", "prompt": PROMPTS[0], **OPTIONS}).encode()
    with urllib.request.urlopen(
        urllib.request.Request(f"http://{suite.http}/v1/completions", body, {"content-type": "application/json"})
    ) as answer:
        assert json.load(answer)["choices"][0]["text"] == text
    listed = json.loads(penstock("models", "--executors", "--json"))
    assert sorted(executor["role"] for executor in listed[0]["executors"]) == ["decode", "prefill"]


def test_pools_grow_shrink_and_change_under_load_without_a_failed_or_another_answer(suite, penstock):
    with Load(suite) as load:
        load.wait_for_more()
        penstock("scale", "--decode", "3")
        assert roles(penstock) == {"prefill": 1, "decode": 3}
        load.wait_for_more()
        assert penstock("role", "decode-0", "prefill") == "decode-0: prefill\n"
        assert roles(penstock) == {"prefill": 2, "decode": 2}
        load.wait_for_more()
        penstock("scale", "--decode", "1", "--prefill", "1")
        assert list(executors(penstock)) == ["prefill-0", "decode-1"]
        load.wait_for_more()
    assert load.wrong == []
    assert load.handoffs > 0
    suite.assert_idle()


def test_an_executor_that_dies_comes_back_with_the_role_that_it_was_given(suite, penstock):
    before = executors(penstock)["prefill-0"]
    penstock("role", before["executor"], "decode")
    psutil.Process(before["pid"]).send_signal(signal.SIGKILL)

    def back():
        after = executors(penstock)["prefill-0"]
        return after["executor"] not in {"", before["executor"]} and after

    after = wait_for(back, timeout=120)
    assert (after["role"], after["address"]) == ("decode", before["address"])
    states = {state.description.executor_id: state.description.role for state in suite.executors()}
    assert states[after["executor"]] == 3
    penstock("role", "prefill-0", "prefill")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("scale", "--decode", "0", "--prefill", "0"), "from 1 to 64 executors together, and are 0"),
        (("role", "decode-9", "prefill"), r"EXECUTOR: must be one of prefill-0, .*, or an executor's id"),
    ],
)
def test_what_can_not_be_is_refused_and_changes_nothing(penstock, arguments, why):
    before = executors(penstock)
    with pytest.raises(ConfigError, match=why):
        penstock(*arguments)
    assert executors(penstock) == before
