"""Cancel, deadline and a client that is gone, at every stage of a request: all that was taken for it comes back."""

import contextlib
import http.client
import json
import signal
import threading

import pytest
from suite import Suite, wait_for

from penstock.client import DeadlineExceeded

PROMPT = "Count from 7: 7 8 9"
LONG = {"max_tokens": 1900, "ignore_eos": True}

# The stage that a request stands in while this service is stopped.
STAGES = {"encoding": "tokenizer", "queued": "scheduler", "placed, no token yet": "executor"}


@contextlib.contextmanager
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


def test_deadline_while_decoding_is_a_finish_reason_behind_the_text(hasty):
    # The gateway's own deadline: a client's would have it cancel the call by itself. The executor is stopped so that it is no race.
    with contextlib.closing(post(hasty, {"prompt": PROMPT, "n": 4, "stream": True, **LONG})) as connection:
        events = told_events(connection)
        text = next(choice["text"] for event in events for choice in event["choices"] if choice["text"])
        with stopped(hasty, "executor"):
            choices = [choice for event in events for choice in event["choices"]]
    assert text
    reasons = {choice["index"]: choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None}
    assert reasons == dict.fromkeys(range(4), "deadline")
    assert wait_for(hasty.executors), "the executor does not come back"
    hasty.assert_idle()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """A suite whose gateway gives an answer a few seconds."""
    settings = tmp_path_factory.mktemp("hasty") / "penstock.yaml"
    settings.write_text("gateway:\n  default_deadline_seconds: 5.0\n")
    with Suite("builtin", "--dtype", "f32", "--max-batch-size", "8", "--config", str(settings)) as running:
        yield running
        assert running.stop() == 0


def told_events(connection):
    """The events of a server-sent stream as they come, none of them an error."""
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            assert "error" not in event
            yield event


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
