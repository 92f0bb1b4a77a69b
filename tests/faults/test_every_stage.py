"""Cancel, deadline and a client that is gone, at every stage of a request: all that was taken for it comes back."""

import http.client
import json
import signal
import threading
from contextlib import contextmanager

import pytest
from suite import Suite, wait_for

from penstock.client import DeadlineExceeded, FinishReason

PROMPT = "Count from 7: 7 8 9"
LONG = {"max_tokens": 1900, "ignore_eos": True}

# The stage that a request stands in while this service is stopped.
STAGES = {"encoding": "tokenizer", "queued": "scheduler", "placed, no token yet": "executor"}


@contextmanager
def stopped(suite: Suite, name: str):
    victims = suite.services(name)
    for victim in victims:
        victim.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for victim in victims:
            victim.send_signal(signal.SIGCONT)


def in_work(suite: Suite):
    return suite.gauges()["penstock_gateway_calls"] > 0


@pytest.fixture(autouse=True)
def idle(suite):
    assert wait_for(lambda: all(e.load.kv_blocks_free for e in suite.executors()) and suite.executors())
    suite.assert_idle()
    yield
    suite.assert_idle()


@pytest.mark.parametrize("stage", STAGES)
def test_cancel_before_the_first_token(suite, stage):
    with suite.client() as client, stopped(suite, STAGES[stage]):
        stream = client.generate(PROMPT, **LONG)
        reader = threading.Thread(target=list, args=(stream,))
        reader.start()
        assert wait_for(lambda: in_work(suite))
        stream.close()
        reader.join(timeout=20)
        assert not reader.is_alive()
        assert wait_for(lambda: not in_work(suite)), "the gateway still holds it"


@pytest.mark.parametrize("stage", STAGES)
def test_deadline_before_the_first_token(suite, stage):
    with suite.client() as client, stopped(suite, STAGES[stage]), pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, timeout=0.7, **LONG).result()


@pytest.mark.parametrize("stage", STAGES)
def test_http_client_gone_before_the_first_token(suite, stage):
    with stopped(suite, STAGES[stage]):
        connection = post(suite, {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True})
        assert wait_for(lambda: in_work(suite))
        connection.close()
        assert wait_for(lambda: not in_work(suite)), "the gateway still holds it"


def test_cancel_while_decoding(suite):
    with suite.client() as client:
        for event in client.generate(PROMPT, **LONG):
            assert event.text
            break


def test_cancel_behind_a_full_batch(suite):
    with suite.client() as client:
        running = [client.generate(PROMPT, **LONG) for _ in range(12)]
        iterators = [iter(stream) for stream in running]
        next(iterators[0])
        for stream in running:
            stream.close()


def test_deadline_while_decoding_ends_with_a_reason_of_its_own(suite):
    with suite.client() as client:
        streams = [client.generate(PROMPT, timeout=1.0, n=8, **LONG) for _ in range(3)]
        outcomes = []

        def read(stream):
            try:
                outcomes.append({choice.finish.reason for choice in stream.result().choices})
            except DeadlineExceeded:
                outcomes.append({FinishReason.DEADLINE})

        readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
    assert len(outcomes) == 3
    assert any(FinishReason.DEADLINE in reasons for reasons in outcomes)


def test_http_client_gone_while_decoding(suite):
    connection = post(suite, {"prompt": PROMPT, "max_tokens": 1900, "ignore_eos": True, "stream": True})
    answer = connection.getresponse()
    assert answer.readline()
    answer.close()
    connection.close()


def post(suite, body):
    connection = http.client.HTTPConnection(suite.http, timeout=30)
    connection.request("POST", "/v1/completions", json.dumps({"model": "builtin", **body}), {"content-type": "application/json"})
    return connection
