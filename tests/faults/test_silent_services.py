"""A service that neither answers nor ends: the gateway knows it within two leases, says so, and goes on when it comes back."""

import signal

import httpx
import pytest
from suite import Suite, wait_for


@pytest.fixture(scope="module")
def suite():
    with Suite("builtin", "--backend", "fake") as suite:
        yield suite


# By keepalive alone gRPC gives a silent link up within 4.5 s, and by its own defaults after a minute.
SOON = 20


@pytest.mark.parametrize(("service", "why"), [("scheduler", "no scheduler"), ("tokenizer", "no tokenizer")])
def test_a_service_that_is_stopped_is_missed(suite, service, why):
    def ready():
        return httpx.get(f"http://{suite.http}/ready", timeout=10)

    (process,) = suite.services(service)
    process.send_signal(signal.SIGSTOP)
    try:
        assert wait_for(lambda: ready().status_code == 503, SOON), "it is ready without a service that it needs"
        assert ready().json()["reason"] == why
    finally:
        process.send_signal(signal.SIGCONT)
    assert wait_for(lambda: ready().status_code == 200)
    with suite.client() as client:
        assert client.generate("x", max_tokens=3, ignore_eos=True).result().usage.completion_tokens == 3
    suite.assert_idle()
