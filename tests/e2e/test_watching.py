"""A running suite as its operator sees it: one request id in all logs, metrics that add up, one trace, health that tells."""

import contextlib
import json
import re
import signal
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from prometheus_client.parser import text_string_to_metric_families
from suite import SERVICES, Suite, wait_for

from penstock.client import Client, InvalidRequest, Unavailable

SERVED = {
    "gateway": "penstock.v1.Inference",
    "tokenizer": "penstock.internal.v1.TokenizerService",
    "scheduler": "penstock.internal.v1.SchedulerService",
    "executor": "penstock.internal.v1.ExecutorService",
}
PROMPT = "Count from 7: 7 8 9"


@pytest.fixture(scope="module")
def suite(collector):
    environment = {
        "PENSTOCK_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "PENSTOCK_SCHEDULER_EXECUTOR_WAIT_SECONDS": "0.1",
    }
    flags = ("--dtype", "f32", "--log-level", "debug", "--log-format", "json")
    with Suite("builtin", *flags, environment=environment) as running:
        yield running
        assert running.stop() == 0


def lines(suite, request_id):
    """The log lines of a request, as (process, line)."""
    told = [json.loads(line) for line in list(suite.log) if request_id in line]
    return [(line["process"], line) for line in told]


def test_every_line_on_stderr_is_json_that_tells_its_process(suite):
    told = [json.loads(line) for line in list(suite.log)]
    assert all({"event", "service", "level", "timestamp"} <= line.keys() for line in told)
    by_supervisor = [(line["event"], line.get("process")) for line in told if line["service"] == "up"]
    assert by_supervisor[0] == ("serving", None)
    assert {("metrics", "executor"), ("metrics", "scheduler")} <= set(by_supervisor)
    assert {"executor", "scheduler"} <= {line["process"] for line in told if line["service"] != "up"}


def test_the_choice_of_a_backend_tells_what_speaks_for_it_and_why_not_the_others(suite):
    chosen = next(line for line in map(json.loads, list(suite.log)) if line["event"] == "backend chosen")
    assert chosen["why"]
    assert "fake" in {other.partition(":")[0] for other in chosen["others"]}
    assert chosen["backend"] not in {other.partition(":")[0] for other in chosen["others"]}


def services_that_told(suite, request_id):
    return {name for name, line in lines(suite, request_id) if line["request_id"] == request_id}


def post(suite, path, body, **headers):
    request = urllib.request.Request(
        f"http://{suite.http}{path}", json.dumps(body).encode(), {"content-type": "application/json", **headers}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer), dict(answer.headers)


def http_status(suite, path):
    try:
        with urllib.request.urlopen(f"http://{suite.http}{path}") as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_clients_request_id_stands_in_the_lines_of_every_service(suite):
    with suite.client() as client:
        result = client.generate(PROMPT, max_tokens=4, request_id="asked-over-grpc").result()
    assert result.closing.request_id == "asked-over-grpc"
    _, headers = post(suite, "/v1/completions", {"prompt": PROMPT, "max_tokens": 4}, **{"X-Request-Id": "asked-over-http"})
    assert headers["x-request-id"] == "asked-over-http"
    for request_id in ("asked-over-grpc", "asked-over-http"):
        assert wait_for(lambda told=request_id: services_that_told(suite, told) == set(SERVICES)), lines(suite, request_id)


def test_a_request_id_of_the_servers_own_does_too(suite):
    with suite.client() as client:
        over_grpc = client.generate(PROMPT, max_tokens=4).result().closing.request_id
    _, headers = post(suite, "/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
    for request_id in (over_grpc, headers["x-request-id"]):
        assert wait_for(lambda told=request_id: services_that_told(suite, told) == set(SERVICES)), lines(suite, request_id)


@contextlib.contextmanager
def executor_stopped(suite):
    """Nothing is computed meanwhile."""
    (executor,) = suite.services("executor")
    executor.suspend()
    try:
        yield
    finally:
        executor.resume()


def access_line(suite, request_id):
    def find():
        return [line for name, line in lines(suite, request_id) if name == "gateway" and line["event"] == "request"]

    (line,) = wait_for(find)
    assert line["level"] == "info"
    return line


def test_one_access_line_tells_how_a_request_ended_and_what_it_took(suite):
    options = {"max_tokens": 5, "ignore_eos": True}
    with suite.client() as client:
        client.generate(PROMPT, request_id="line-1", **options).result()
        with pytest.raises(InvalidRequest):
            client.generate(PROMPT, top_p=3.0, request_id="line-2").result()
        with client.generate(PROMPT, max_tokens=1500, ignore_eos=True, request_id="line-3") as left:
            events = iter(left)
            next(events)
            with executor_stopped(suite):
                left.close()
                access_line(suite, "line-3")
    post(suite, "/v1/completions", {"prompt": PROMPT, **options}, **{"X-Request-Id": "line-4"})
    with pytest.raises(urllib.error.HTTPError):
        post(suite, "/v1/completions", {"prompt": PROMPT, "topp": 3}, **{"X-Request-Id": "line-5"})
    done = access_line(suite, "line-1")
    assert (done["door"], done["method"], done["status"]) == ("grpc", "penstock.v1.Inference/Generate", "OK")
    assert (done["completion_tokens"], done["finish"]) == (5, ["length"])
    assert 0 < done["first_token_seconds"] < done["seconds"]
    refused = access_line(suite, "line-2")
    assert (refused["status"], refused["error"]) == ("INVALID_ARGUMENT", "InvalidRequest")
    assert "sampling.top_p" in refused["why"]
    assert "completion_tokens" not in refused
    cancelled = access_line(suite, "line-3")
    assert (cancelled["status"], cancelled["finish"]) == ("CANCELLED", ["cancelled"])
    assert 0 < cancelled["completion_tokens"] < 1500
    over_http = access_line(suite, "line-4")
    assert (over_http["door"], over_http["method"], over_http["status"]) == ("http", "POST /v1/completions", 200)
    refused = access_line(suite, "line-5")
    assert (refused["status"], refused["error"]) == (400, "InvalidRequest")
    assert "topp" in refused["why"]
    assert (over_http["prompt_tokens"], over_http["completion_tokens"]) == (done["prompt_tokens"], 5)


def test_a_refusal_of_the_scheduler_bears_the_clients_id(suite):
    with executor_stopped(suite):
        assert wait_for(lambda: not suite.executors())
        with Client(suite.grpc, retries=0) as client, pytest.raises(Unavailable):
            client.generate(PROMPT, request_id="never-placed").result()
    assert wait_for(suite.executors)
    (refused,) = (line for name, line in lines(suite, "never-placed") if name == "scheduler")
    assert (refused["event"], refused["reason"], refused["level"]) == ("refused", "no_executor", "info")
    assert access_line(suite, "never-placed")["status"] == "UNAVAILABLE"


def scrape(suite):
    """Each service's samples, as {service: {(name, labels without model_name): value}}."""
    told = {}
    for name, url in suite.metrics_urls().items():
        with urllib.request.urlopen(url) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            told[name] = {
                (s.name, *(v for k, v in s.labels.items() if k != "model_name")): s.value for f in families for s in f.samples
            }
    return told


def test_metrics_add_up(suite):
    suite.assert_idle()
    before = scrape(suite)
    salted = {"cache_salt": "metrics", "temperature": 0.0}
    long_prompt = " ".join(str(n) for n in range(200))
    with suite.client() as client:
        by_length = client.generate(long_prompt, max_tokens=8, ignore_eos=True, **salted).result()
        hit = client.generate(long_prompt, max_tokens=8, ignore_eos=True, **salted).result()
        stopped = client.generate(PROMPT, max_tokens=64, stop=["13"], **salted).result()
        with client.generate(PROMPT, max_tokens=1500, ignore_eos=True, **salted) as left:
            events = iter(left)
            next(events)
            with executor_stopped(suite):
                running = suite.gauges()
                left.close()
                assert wait_for(lambda: suite.gauges()["penstock_gateway_calls"] == 0)
    suite.assert_idle()
    after = scrape(suite)

    def grown(service, *sample):
        return after[service].get(sample, 0) - before[service].get(sample, 0)

    results = (by_length, hit, stopped)
    prompts = sum(r.usage.prompt_tokens for r in results)
    told = sum(r.usage.completion_tokens for r in results)
    assert hit.usage.cached_tokens > 100
    assert running["penstock_gateway_requests_running"] == 1
    for service, prefix in (("gateway", "penstock_gateway_requests"), ("executor", "penstock_num_requests")):
        assert after[service][f"{prefix}_running",] == 0
        assert after[service][f"{prefix}_waiting",] == 0
    assert after["executor"]["penstock_kv_cache_usage_perc",] == 0
    assert grown("gateway", "penstock_request_success_total", "length") == 2
    assert grown("gateway", "penstock_request_success_total", "stop_sequence") == 1
    assert grown("gateway", "penstock_request_failed_total", "Cancelled") == 1
    assert grown("gateway", "penstock_gateway_prompt_tokens_total") == prompts
    assert grown("gateway", "penstock_gateway_prompt_tokens_cached_total") == hit.usage.cached_tokens
    assert grown("gateway", "penstock_gateway_generation_tokens_total") > told
    assert grown("gateway", "penstock_time_to_first_token_seconds_count") == 4
    assert grown("gateway", "penstock_e2e_request_latency_seconds_count") == 3
    assert grown("executor", "penstock_prefix_cache_hits_total") == hit.usage.cached_tokens
    assert grown("executor", "penstock_prefix_cache_queries_total") >= prompts
    assert grown("executor", "penstock_generation_tokens_total") >= grown("gateway", "penstock_gateway_generation_tokens_total")
    # Every token but each sequence's first has one before it.
    assert grown("executor", "penstock_inter_token_latency_seconds_count") == (
        grown("executor", "penstock_generation_tokens_total") - 4
    )
    assert grown("scheduler", "penstock_scheduler_placements_total", "granted") == 4
    assert grown("scheduler", "penstock_scheduler_queue_time_seconds_count") == 4
    assert grown("tokenizer", "penstock_tokenizer_encoded_tokens_total") > prompts
    assert after["tokenizer"]["penstock_tokenizer_decodings",] == 0


def test_no_two_services_tell_a_figure_under_one_name(suite):
    """A sum over the suite would count it twice. Only the tasks of each process have one name."""
    names = [{name for name, *_ in samples} - {"penstock_tasks"} for samples in scrape(suite).values()]
    assert len(names) == 4
    assert sum(map(len, names)) == len(set().union(*names))


def test_one_request_is_one_trace_through_all_services(suite, collector):
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    post(suite, "/v1/completions", {"prompt": PROMPT, "max_tokens": 8}, traceparent=f"00-{trace_id}-{parent}-01")
    wanted = {
        ("penstock-gateway", "request"),
        ("penstock-tokenizer", "tokenize"),
        ("penstock-scheduler", "queue"),
        ("penstock-executor", "decode"),
    }
    assert wait_for(lambda: wanted <= {(s.service, s.name) for s in collector.trace(trace_id)}), collector.trace(trace_id)
    spans = {s.span_id: s for s in collector.trace(trace_id)}
    (root,) = (s for s in spans.values() if s.parent_id not in spans)
    assert (root.service, root.name, root.parent_id) == ("penstock-gateway", "request", parent)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_answers_health_and_reflection(suite, name):
    with grpc.insecure_channel(suite.address(name)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVED[name]):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health.Check(request, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
            watch = health.Watch(request, timeout=10)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            watch.cancel()
        assert {SERVED[name], "grpc.health.v1.Health"} <= set(ProtoReflectionDescriptorDatabase(channel).get_services())


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGSTOP], ids=lambda by: by.name)
def test_the_gateways_health_tells_that_no_executor_answers(suite, by):
    (executor,) = suite.services("executor")
    with grpc.insecure_channel(suite.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        executor.send_signal(by)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert http_status(suite, "/ready") == 503
        if by is signal.SIGSTOP:
            executor.resume()
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert http_status(suite, "/ready") == 200
        watch.cancel()


def test_the_documented_metrics_are_those_that_there_are(suite):
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    sections = {part.partition("\n")[0].lower(): part for part in re.split(r"^### ", text, flags=re.MULTILINE)}
    for service, url in suite.metrics_urls().items():
        tables = sections[service] + sections["every service"]
        documented = set(re.findall(r"^\| `(penstock_\w+)`", tables, flags=re.MULTILINE))
        with urllib.request.urlopen(url) as answer:
            told = {line.split()[2] for line in answer.read().decode().splitlines() if line.startswith("# TYPE")}
        assert documented == set(told), service
