"""A backend of another package, in real processes: found, served, and when it raises, hangs or dies, isolated and named."""

import json
import os
import re
import socket
import subprocess
import sys

import grpc
import outside
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from suite import Suite, wait_for

from penstock.backends.fake import next_token
from penstock.client import FinishReason
from penstock.internal.v1 import executor_pb2, executor_pb2_grpc

PROMPT = list(range(1, 20))
DIED, STOOD = "backend outside died in step: ", "a step of backend outside "


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return outside.install(tmp_path_factory.mktemp("outside"))


@pytest.fixture
def faulty(environment, tmp_path):
    return lambda fault: {**environment, "OUTSIDE_FAULT": fault, "OUTSIDE_MARK": str(tmp_path / "mark")}


def penstock(environment, *arguments, timeout=60):
    argv = [sys.executable, "-m", "penstock.cli", *arguments]
    return subprocess.run(argv, env={**os.environ, **environment}, capture_output=True, text=True, timeout=timeout, check=False)


def expected(count, vocabulary):
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(next_token(ids, vocabulary))
    return ids[len(PROMPT) :]


def row_of(environment, *arguments):
    done = penstock(environment, "backends", "--model", "builtin", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    return rows[outside.NAME], rows


def test_the_table_tells_where_it_is_from_and_what_it_can(environment):
    row, rows = row_of(environment)
    assert (row["package"], row["version"], row["devices"]) == ("penstock-outside 2.1", "9.9", ["npu:0"])
    assert row["verdict"] == "chosen", "an accelerator goes before a CPU"
    assert row["supports"]["kv_layouts"] == ["token-ids"]
    assert row["supports"]["max_context"] == 512
    assert rows["openvino"]["why"] == "outside has an accelerator"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("import raises", "import failed: ImportError: libnpu.so.2 is missing"),
        ("probe raises", "raised OSError: no such device"),
        ("probe hangs", "hangs in probe: no answer within 3 s"),
        ("probe crashes", "died in probe: killed by SIGSEGV"),
        (
            "unknown dtype",
            "its capabilities are nonsense: dtypes: must be a tuple of DType (f32, bf16, int8, int4), and is ('fp4',)",
        ),
        ("negative size", "its capabilities are nonsense: max_context: must be a whole number from 1, or None, and is -7"),
    ],
)
def test_what_it_does_wrong_is_said_of_it_alone(faulty, fault, why):
    row, rows = row_of(faulty(fault), "--probe-seconds", "3")
    assert (row["verdict"], row["why"]) == ("broken", why)
    assert rows["openvino"]["verdict"] == "chosen"


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("probe raises", "no backend can run builtin: outside: broken: raised OSError: no such device"),
        ("create raises", "raised in create: MemoryError: the device is full"),
        ("create crashes", "backend outside died in create: killed by SIGSEGV"),
        ("create hangs", "backend outside has not loaded builtin within 2 s"),
        ("wrong layout", "outside made a model that is not what it said: kv.layout: is 'upside down'"),
    ],
)
def test_an_executor_that_was_told_to_use_it_ends_with_one_line(faulty, fault, why):
    environment = faulty(fault)
    done = penstock(
        environment, "executor", "--backend", outside.NAME, "--model", "builtin", "--load-seconds", "2", "--listen", "127.0.0.1:0"
    )
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("penstock executor: ")]
    assert len(said) == 1
    assert why in said[0]
    assert wait_for(lambda: not any(is_in(p, environment) for p in psutil.process_iter())), "its process is left behind"


def is_in(process, environment):
    try:
        return process.environ().get("OUTSIDE_MARK") == environment["OUTSIDE_MARK"]
    except psutil.Error:
        return False


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded():
    flags = (
        "--model",
        "builtin",
        "--backend",
        "openvino",
        "--dtype",
        "f32",
        "--kv-cache-gib",
        "1000000",
        "--listen",
        "127.0.0.1:0",
    )
    done = penstock({}, "executor", *flags)
    assert done.returncode == 1
    assert "not enough memory: openvino needs 1000000.01 GiB for weights in f32" in done.stderr
    assert re.search(r"(?m)what would fit: --kv-cache-gib [\d.]+ with f32$", done.stderr)


def test_an_executor_that_loads_says_not_serving_and_why(faulty):
    address = free_address()
    argv = [sys.executable, "-m", "penstock.cli", "executor", "--backend", outside.NAME, "--model", "builtin", "--listen", address]
    process = subprocess.Popen(argv, env={**os.environ, **faulty("create hangs")}, stderr=subprocess.DEVNULL)
    try:
        with grpc.insecure_channel(address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
            told = wait_for(lambda: failure(channel, "backend outside loads builtin"))
            assert told, "the executor does not say what it waits for"
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
            assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert wait_for(lambda: psutil.Process(process.pid).children())
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    assert not psutil.wait_procs(children, timeout=20)[1], "its process outlives the executor"


def failure(channel, text):
    told = executor_pb2_grpc.ExecutorServiceStub(channel).GetExecutor(executor_pb2.GetExecutorRequest(), timeout=10).failure
    return told if text in told else None


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"127.0.0.1:{probe.getsockname()[1]}"


def test_it_is_served_and_advertised(environment):
    with Suite("builtin", "--backend", outside.NAME, environment=environment) as suite, suite.client() as client:
        answer = client.generate(PROMPT, max_tokens=30, ignore_eos=True, token_ids=True, temperature=0).result()
        (model,) = client.models()
        (executor,) = model.executors
        assert list(answer.choices[0].token_ids) == expected(30, model.vocabulary_size)
        assert answer.choices[0].finish.reason is FinishReason.LENGTH
        assert (executor.backend, executor.backend_version, executor.device) == (outside.NAME, "9.9", "npu:0")
        assert {"batch_invariant", "matmul=systolic"} <= set(executor.features)
        assert model.context_length == 512
        suite.assert_idle()
        assert suite.stop() == 0


@pytest.mark.parametrize(
    ("fault", "stalled", "died"),
    [
        ("step exits", DIED + "exit status 5", DIED + "exit status 5"),
        ("step crashes", DIED + "killed by SIGSEGV", DIED + "killed by SIGSEGV"),
        ("step hangs", STOOD + "takes longer than it may", STOOD + "has not come back for 1 s beyond what it may take"),
    ],
)
def test_a_backend_that_ends_or_hangs_in_a_step_costs_a_pause(faulty, fault, stalled, died):
    environment = faulty(fault) | {"PENSTOCK_EXECUTOR_STALL_EXIT_SECONDS": "1"}
    with Suite("builtin", "--backend", outside.NAME, environment=environment) as suite, suite.client() as client:
        stream = client.generate(PROMPT, max_tokens=120, ignore_eos=True, token_ids=True, temperature=0)
        answer = stream.result()
        assert list(answer.choices[0].token_ids) == expected(120, client.models()[0].vocabulary_size)
        assert answer.closing.replacements == 1
        suite.assert_idle()
        assert suite.stop() == 0
    told = [json.loads(line) for line in suite.log]
    assert [line for line in told if line["event"] == "died" and line["process"] == "executor" and died in line["why"]], suite.log
    assert [line for line in told if line["event"] == "executor stalled" and stalled in line["failure"]], suite.log
    assert wait_for(lambda: not any(is_in(p, environment) for p in psutil.process_iter())), "its process is left behind"
