"""A suite that leaves while answers run for longer than its grace: each ends with what there is of it, and says so."""

import json
import threading

import httpx
import pytest
from suite import Suite

from penstock.client import FinishReason

# Many seconds of work on any machine.
LONG = {"max_tokens": 1800, "ignore_eos": True, "n": 16}


@pytest.fixture
def suite():
    with Suite("builtin", "--grace-seconds", "0.3") as suite:
        yield suite


@pytest.fixture
def leaves(suite):
    leaving = threading.Thread(target=suite.stop)
    yield leaving.start
    leaving.join()
    assert suite.process.returncode == 0
    assert any('"drain cut short"' in line and '"gateway"' in line for line in suite.log), suite.log[-20:]
    assert not any("Traceback" in line for line in suite.log)


def test_a_stream_over_http_ends_as_cancelled_with_the_error_behind_it(suite, leaves):
    body = {"prompt": "Count", "stream": True, **LONG}
    with httpx.stream("POST", f"http://{suite.http}/v1/completions", json=body, timeout=60) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: "))
        first = next(lines)
        leaves()
        *events, error, done = [first, *lines]
    assert done == "[DONE]"
    assert json.loads(error)["error"]["code"] == "unavailable"
    reasons = [choice["finish_reason"] for event in events for choice in json.loads(event)["choices"] if choice["finish_reason"]]
    assert reasons == ["cancelled"] * 16


def test_a_stream_over_grpc_ends_as_cancelled_with_its_usage(suite, leaves):
    with suite.client() as client, client.generate("Count", **LONG) as stream:
        told = iter(stream)
        next(told)
        leaves()
        finishes = [event.finish.reason for event in told if event.finish]
        closing = stream.closing
    assert finishes == [FinishReason.CANCELLED] * 16
    assert closing.usage.prompt_tokens > 0
