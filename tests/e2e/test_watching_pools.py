"""Prefill and decode apart as an operator sees them: what responses prove, metrics that agree with their sum, one trace, a dashboard."""

import json
import re
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from suite import Suite, wait_for

ROOT = Path(__file__).parents[2]
PARTS = ("encode", "queue", "prefill", "hops", "text")
PROMPTS = [f"Count from {n}: {n} {n + 1} {n + 2}" for n in (3, 17, 88, 300)]


@pytest.fixture(scope="module")
def suite(collector):
    environment = {
        "PENSTOCK_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "PENSTOCK_EXECUTOR_CALIBRATION_SECONDS": "0",
    }
    flags = ("--dtype", "f32", "--prefill", "1", "--decode", "1", "--threads", "2", "--placement", "apart")
    with Suite("builtin", *flags, environment=environment) as running:
        yield running
        assert running.stop() == 0


def samples(suite):
    """All services' samples, each as (name, labels without model_name), summed."""
    told = Counter()
    for url in suite.metrics_urls().values():
        with urllib.request.urlopen(url) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k != "model_name"))
                    told[sample.name, labels] += sample.value
    return told


def total(told, name, **labels):
    return sum(value for (found, given), value in told.items() if found == name and labels.items() <= dict(given).items())


def test_metrics_agree_with_what_the_responses_prove(suite):
    suite.assert_idle()
    before = samples(suite)
    with suite.client() as client:
        results = [client.generate(prompt, max_tokens=12, temperature=0, ignore_eos=True).result() for prompt in PROMPTS]
    suite.assert_idle()
    assert wait_for(lambda: not total(samples(suite), "penstock_handoffs_live"))  # an answer may end before its Ack is heard
    after = samples(suite)

    def grown(name, **labels):
        return total(after, name, **labels) - total(before, name, **labels)

    handoffs = [result.closing.handoff for result in results]
    roles = {e.description.executor_id: e.description.role for e in suite.executors()}
    for result in results:
        assert result.closing.prefill_executor_id != result.closing.decode_executor_id
        assert {result.closing.prefill_executor_id, result.closing.decode_executor_id} == set(roles)
    assert grown("penstock_handoffs_total", side="decode", outcome="done") == len(results)
    assert grown("penstock_handoffs_total", side="prefill", outcome="done") == len(results)
    assert grown("penstock_handoff_kv_bytes_total") == sum(h.kv_bytes for h in handoffs) > 0
    assert grown("penstock_handoff_seconds_total") == pytest.approx(sum(h.transfer_seconds for h in handoffs), abs=1e-5)
    for transport in {h.transport for h in handoffs}:
        moved = sum(h.kv_bytes for h in handoffs if h.transport == transport)
        assert grown("penstock_handoff_kv_bytes_total", transport=transport) == moved
        assert grown("penstock_handoff_pushed_bytes_total", transport=transport) == moved
    assert grown("penstock_requests_placed_total", how="apart", reason="policy") == len(results)
    assert grown("penstock_fallbacks_total") == 0
    assert grown("penstock_handoff_refusals_total") == 0
    assert total(after, "penstock_handoffs_live") == 0
    for part in ("encode", "queue", "prefill", "hops", "text", "transfer", "first_step"):
        assert grown("penstock_time_to_first_token_part_seconds_count", part=part) == len(results)
    before_text = [grown("penstock_time_to_first_token_part_seconds_sum", part=part) for part in PARTS]
    assert sum(before_text) == pytest.approx(sum(result.closing.first_text_seconds for result in results), abs=1e-5)


def test_kv_that_came_for_one_tenant_is_found_by_no_other(suite):
    prompt = " ".join(str(n) for n in range(150))
    options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
    with suite.client() as client:
        first = client.generate(prompt, cache_salt="one", **options).result()
        again = client.generate(prompt, cache_salt="one", **options).result()
        other = client.generate(prompt, cache_salt="another", **options).result()
    assert first.usage.cached_tokens == other.usage.cached_tokens == 0
    assert again.usage.cached_tokens > 100
    assert other.closing.handoff.kv_bytes == first.closing.handoff.kv_bytes
    assert first.choices[0].text == other.choices[0].text == again.choices[0].text


def test_one_trace_leads_from_the_door_through_both_executors(suite, collector):
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    body = json.dumps({"prompt": PROMPTS[0], "max_tokens": 8, "ignore_eos": True}).encode()
    headers = {"content-type": "application/json", "traceparent": f"00-{trace_id}-{parent}-01"}
    urllib.request.urlopen(urllib.request.Request(f"http://{suite.http}/v1/completions", body, headers)).close()
    wanted = {
        *(("penstock-gateway", name) for name in ("request", "place", "reserve", "prefill", "transfer", "decode")),
        *(("penstock-executor", name) for name in ("wait", "prefill", "import", "decode")),
        ("penstock-scheduler", "queue"),
        ("penstock-tokenizer", "tokenize"),
    }
    assert wait_for(lambda: wanted <= {(s.service, s.name) for s in collector.trace(trace_id)}), collector.trace(trace_id)
    spans = {s.span_id: s for s in collector.trace(trace_id)}
    (root,) = (s for s in spans.values() if s.parent_id not in spans)
    assert (root.name, root.parent_id) == ("request", parent)


def test_the_dashboard_asks_for_metrics_that_exist(suite):
    told = set()
    for url in suite.metrics_urls().values():
        with urllib.request.urlopen(url) as answer:
            told |= set(re.findall(r"^# TYPE (penstock_\w+)", answer.read().decode(), re.MULTILINE))
    known = told | {f"{name}{end}" for name in told for end in ("_bucket", "_sum", "_count")}
    dashboard = (ROOT / "deploy/grafana/dashboards/penstock.json").read_text()
    asked = set(re.findall(r"\bpenstock_\w+", dashboard))
    assert len(asked) > 20
    assert asked <= known
