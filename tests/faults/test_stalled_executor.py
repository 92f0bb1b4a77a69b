"""An executor that is stopped but not dead: what runs there goes on elsewhere, and when it comes back it holds nothing."""

import signal
import threading

import pytest
from suite import Suite, wait_for

PROMPTS = [f"Count from {n}: {n} {n + 1} {n + 2}" for n in (3, 17, 40, 88)]
OPTIONS = {"max_tokens": 400, "ignore_eos": True, "token_ids": True, "temperature": 0.9, "seed": 11}


class Load:
    """Four streams at once; what each has told so far, its whole answer, and how often it was placed again."""

    def __init__(self, client):
        self.told = [0] * len(PROMPTS)
        self.outcomes = [None] * len(PROMPTS)
        self.replaced = [0] * len(PROMPTS)
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
        self.outcomes[i], self.replaced[i] = (ids, text), stream.closing.replacements

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


def address_of(process, addresses):
    """Which of these the process listens on."""
    ports = {c.laddr.port for c in process.net_connections("tcp") if c.status == "LISTEN"}
    return next(address for address in addresses if int(address.rpartition(":")[2]) in ports)


def registered(suite):
    return [e.description.address for e in suite.executors()]


def test_streams_of_a_stopped_executor_complete_while_it_is_stopped(suite):
    assert wait_for(lambda: len(registered(suite)) == 2)
    victim = suite.services("executor")[0]
    address = address_of(victim, registered(suite))
    with suite.client() as client:
        undisturbed = Load(client).join()
        suite.assert_idle()
        load = Load(client)
        assert wait_for(lambda: all(0 < told < OPTIONS["max_tokens"] for told in load.told)), load.told
        victim.send_signal(signal.SIGSTOP)
        try:
            assert load.join() == undisturbed
            assert any(load.replaced), "nothing ran on the executor that was stopped"
            assert address not in registered(suite)
        finally:
            victim.send_signal(signal.SIGCONT)
        assert wait_for(lambda: address in registered(suite)), "it does not come back"
        suite.assert_idle()
        again = Load(client)
        assert again.join() == undisturbed
        assert not any(again.replaced)
        suite.assert_idle()
