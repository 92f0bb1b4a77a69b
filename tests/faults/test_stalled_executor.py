"""An executor that is stopped but not dead: what runs there goes on elsewhere, and when it comes back it holds nothing."""

import signal
import threading

import pytest
from suite import Suite, wait_for

PROMPTS = [f"Count from {n}: {n} {n + 1} {n + 2}" for n in (3, 17, 40, 88)]
OPTIONS = {"max_tokens": 600, "ignore_eos": True, "token_ids": True, "temperature": 0.9, "seed": 11}


class Load:
    """Four streams at once; what each has told so far, and its whole answer."""

    def __init__(self, client):
        self.told = [0] * len(PROMPTS)
        self.outcomes = [None] * len(PROMPTS)
        self._client = client
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(len(PROMPTS))]
        for thread in self._threads:
            thread.start()

    def _run(self, i):
        stream, ids, text = self._client.generate(PROMPTS[i], **OPTIONS), [], ""
        for event in stream:
            ids += event.token_ids
            text += event.text
            self.told[i] = len(ids)
        self.outcomes[i] = ids, text

    def join(self):
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), self.told
        return self.outcomes


@pytest.fixture(scope="module")
def suite():
    with Suite("builtin", "--dtype", "f32", "--workers", "2", "--max-batch-size", "8") as running:
        yield running
        assert running.stop() == 0


def running_on(suite):
    return {e.description.address: suite.executor(e.description.address).load.running for e in suite.executors()}


def test_streams_of_a_stopped_executor_complete_while_it_is_stopped(suite):
    assert wait_for(lambda: len(suite.executors()) == 2)
    with suite.client() as client:
        undisturbed = Load(client).join()
        suite.assert_idle()
        load = Load(client)
        assert wait_for(lambda: all(0 < told < OPTIONS["max_tokens"] for told in load.told)), load.told
        victim = suite.services("executor")[0]
        (address,) = (f"127.0.0.1:{c.laddr.port}" for c in victim.net_connections("tcp") if is_server(c, running_on(suite)))
        assert running_on(suite)[address], "nothing runs on the one that is to be stopped"
        victim.send_signal(signal.SIGSTOP)
        try:
            assert load.join() == undisturbed
            assert address not in running_on(suite)
        finally:
            victim.send_signal(signal.SIGCONT)
        assert wait_for(lambda: address in running_on(suite)), "it does not come back"
        suite.assert_idle()
        assert Load(client).join() == undisturbed
        suite.assert_idle()


def is_server(connection, addresses):
    return connection.status == "LISTEN" and f"127.0.0.1:{connection.laddr.port}" in addresses
