import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from penstock.common import metrics
from penstock.common.service import StartError


def test_endpoint_tells_its_own_registry_alone_and_gives_the_port_back():
    ours, others = CollectorRegistry(), CollectorRegistry()
    Counter("penstock_ours", "x", registry=ours).inc(3)
    Counter("penstock_others", "x", registry=others).inc()
    server = metrics.serve(ours, "127.0.0.1:0")
    try:
        text = httpx.get(f"http://{server.address}/metrics").text
    finally:
        server.close()
    assert "penstock_ours_total 3.0" in text
    assert "penstock_others" not in text
    server.close()
    metrics.serve(others, server.address).close()


@pytest.mark.parametrize("address", ["9000", "localhost:", "127.0.0.1:99999", "127.0.0.1:http"])
def test_wrong_address_is_named(address):
    with pytest.raises(StartError, match="HOST:PORT"):
        metrics.serve(CollectorRegistry(), address)


def test_taken_port_is_one_line_that_says_so():
    server = metrics.serve(CollectorRegistry(), "127.0.0.1:0")
    try:
        with pytest.raises(StartError, match=server.address):
            metrics.serve(CollectorRegistry(), server.address)
    finally:
        server.close()


@pytest.mark.parametrize(
    "buckets", [metrics.TIME_TO_FIRST_TOKEN_SECONDS, metrics.INTER_TOKEN_SECONDS, metrics.E2E_SECONDS, metrics.STEP_TOKENS]
)
def test_buckets_rise(buckets):
    assert list(buckets) == sorted(set(buckets))
