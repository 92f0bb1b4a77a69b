"""Each service killed under load: who was running sees a pause at most, text is what it would have been, nothing is held after."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from suite import Suite, wait_for

from penstock.client import Client, PenstockError, Unavailable

PROMPTS = [f"Count from {n}: {n} {n + 1} {n + 2}" for n in (3, 17, 40, 88, 121, 300, 512, 777)]
OPTIONS = {"max_tokens": 320, "ignore_eos": True, "token_ids": True, "temperature": 0.9, "seed": 11}


class Load:
    """Eight streams at once; each result, or error, when it has ended."""

    def __init__(self, suite: Suite):
        self.told = [0] * len(PROMPTS)
        self.outcomes: list = [None] * len(PROMPTS)
        self._client = suite.client()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(PROMPTS))]
        for thread in self._threads:
            thread.start()

    def _run(self, i):
        ids, text = [], ""
        try:
            for event in self._client.generate(PROMPTS[i], **OPTIONS):
                ids += event.token_ids
                text += event.text
                self.told[i] = len(ids)
            self.outcomes[i] = (ids, text)
        except PenstockError as error:
            self.outcomes[i] = error

    def wait_until_running(self):
        assert wait_for(lambda: all(0 < told < OPTIONS["max_tokens"] for told in self.told)), self.told

    def join(self):
        for thread in self._threads:
            thread.join(timeout=120)
        self._client.close()
        return self.outcomes


@pytest.fixture(scope="module")
def undisturbed(suite):
    return Load(suite).join()


@pytest.mark.parametrize("name", ["executor", "tokenizer", "scheduler"])
def test_running_requests_do_not_notice(suite, undisturbed, name):
    load = Load(suite)
    load.wait_until_running()
    suite.kill(name)
    assert load.join() == undisturbed
    suite.assert_idle()


def test_executor_killed_twice_in_a_request(suite, undisturbed):
    load = Load(suite)
    load.wait_until_running()
    suite.kill("executor")
    assert wait_for(lambda: suite.services("executor")), "it is not started again"
    before = list(load.told)
    assert wait_for(lambda: all(now > then for now, then in zip(load.told, before, strict=True)))
    suite.kill("executor")
    assert load.join() == undisturbed
    suite.assert_idle()


def test_gateway_killed(suite, undisturbed):
    load = Load(suite)
    load.wait_until_running()
    suite.kill("gateway")
    assert all(isinstance(outcome, Unavailable) for outcome in load.join())
    suite.assert_idle()
    assert Load(suite).join() == undisturbed


def test_new_requests_wait_for_a_killed_executor(suite, undisturbed):
    suite.kill("executor")
    assert Load(suite).join() == undisturbed


def test_descriptors_and_threads_come_back(suite, undisturbed):
    # Kept: the survivors are the same processes as before, and hold what they held.
    names = ("tokenizer", "scheduler", "gateway")
    Load(suite).join()
    suite.assert_idle()
    before = {name: suite.services(name)[0].num_fds() for name in names}
    load = Load(suite)
    load.wait_until_running()
    suite.kill("executor")
    assert load.join() == undisturbed
    suite.assert_idle()
    assert wait_for(lambda: all(suite.services(n)[0].num_fds() <= before[n] for n in names)), {
        n: (before[n], suite.services(n)[0].num_fds()) for n in names
    }


def test_scheduler_that_is_ended_with_a_queue_fails_no_request(suite, undisturbed):
    whole = [ids for ids, _ in undisturbed]
    with Client(suite.grpc, retries=0) as client, ThreadPoolExecutor(24) as threads:

        def ask(prompt, tokens):
            options = OPTIONS | {"max_tokens": tokens}
            return threads.submit(lambda: [*client.generate(prompt, **options).result().choices[0].token_ids])

        waiting = [ask(prompt, 200) for prompt in 2 * PROMPTS]
        assert wait_for(lambda: suite.counts()["queued"] >= 4)
        (scheduler,) = suite.services("scheduler")
        scheduler.terminate()
        new = [ask(prompt, 20) for prompt in PROMPTS]
        assert [answer.result(60) for answer in waiting] == [ids[:200] for ids in 2 * whole]
        assert [answer.result(60) for answer in new] == [ids[:20] for ids in whole]
        assert psutil.wait_procs([scheduler], timeout=30)[0]
    suite.assert_idle()


def test_tokenizer_that_is_ended_leaves_at_once_and_fails_no_request(suite, undisturbed):
    """Long before the grace: gateways' decoding streams would last as long as they do."""
    load = Load(suite)
    load.wait_until_running()
    (tokenizer,) = suite.services("tokenizer")
    tokenizer.terminate()
    new = Load(suite)
    assert psutil.wait_procs([tokenizer], timeout=10)[0]
    assert load.join() == undisturbed
    assert new.join() == undisturbed
    suite.assert_idle()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_drain_lets_running_requests_finish(by):
    with Suite("builtin", "--dtype", "f32") as suite:
        load = Load(suite)
        load.wait_until_running()
        assert suite.stop(by) == 0
        outcomes = load.join()
    assert [len(outcome[0]) for outcome in outcomes] == [OPTIONS["max_tokens"]] * len(PROMPTS)
    assert suite.printed == [suite.printed[0]]
