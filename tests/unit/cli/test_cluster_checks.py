"""`penstock up` refuses what can not work before it looks for the model."""

import socket

import pytest
from cyclopts import CycloptsError

from penstock.cli.cluster.checks import check, doors, metrics
from penstock.cli.cluster.settings import UpConfig
from penstock.cli.up import up
from penstock.common.config import ConfigError
from penstock.common.service import StartError

FREE = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("PENSTOCK_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"http": "nonsense"}, "--http: can not listen on nonsense: 'nonsense' is not HOST:PORT"),
        ({"grpc": "127.0.0.1:65536"}, "--grpc: can not listen on .* a port from 0 to 65535"),
        ({"grpc": "::1:0"}, "--grpc: .*not HOST:PORT"),
        ({"http": "192.0.2.1:0"}, "--http: can not listen on 192.0.2.1:0: Cannot assign"),
        ({"workers": 0}, "--workers: must be from 1 to 64 executors together, and are 0"),
        ({"workers": -1, "decode": 2}, "--workers: must be from 0 to 64, and is -1"),
        ({"prefill": 40, "decode": 40}, "must be from 1 to 64 executors together, and are 80"),
        ({"workers": 2, "threads": 1}, "--threads: 2 executors need at least one each"),
        ({"prefill": 1, "decode": 2, "threads": 2}, "--threads: 3 executors need at least one each"),
        ({"kv_cache_gib": float("nan")}, "--kv-cache-gib: must be above 0"),
        ({"max_batch_size": -1}, "--max-batch-size: must be above 0"),
        ({"max_restarts": -1}, "--max-restarts: must be 0 or more"),
        ({"backend": "cuba"}, "--backend: must be auto or one of .*torch.*'cuba'"),
        ({"served_name": "a=b"}, "--served-name"),
        ({"decode": 1, "decode_backend": "cuba"}, "--decode-backend: must be auto or one of .*torch.*'cuba'"),
    ],
)
def test_a_wrong_setting_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        check(UpConfig(**{**FREE, **settings}), None)


def test_right_ones_are_taken_and_leave_their_ports_free(file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    settings = UpConfig(http=f"127.0.0.1:{port}", grpc="localhost:0", backend="fake", max_restarts=0)
    for _ in range(2):
        check(settings, file("gateway: {max-choices: 2}\nexecutor: {metrics: '127.0.0.1:0'}\n"))


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_taken_port_is_refused(door):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--{door}: can not listen on {address}: Address already in use"):
            check(UpConfig(**{**FREE, door: address}), None)


def test_one_port_for_two_doors_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ConfigError, match="--grpc: can not listen on"):
        check(UpConfig(http=address, grpc=address), None)


def test_executors_can_not_share_one_metrics_port(file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    path = file(f"executor: {{metrics: '{address}'}}\n")
    check(UpConfig(**FREE), path)
    for counts in ({"workers": 2}, {"prefill": 1, "decode": 1}):
        with pytest.raises(ConfigError, match=f"executor: metrics: 2 executors can not share {address}; 127.0.0.1:0 gives each"):
            check(UpConfig(**FREE, **counts), path)


def test_the_metrics_of_a_service_are_where_its_section_or_its_own_variable_puts_them(file, monkeypatch):
    path = file("executor: {metrics: '127.0.0.1:0', max-batch-size: 4}\ntokenizer: {template_workers: 2}\nscheduler:\n")
    assert metrics(None) == {}
    assert metrics(path) == {"executor": "127.0.0.1:0"}
    monkeypatch.setenv("PENSTOCK_SCHEDULER_METRICS", "127.0.0.2:0")
    monkeypatch.setenv("PENSTOCK_TOKENIZER_METRICS", "")
    monkeypatch.setenv("PENSTOCK_EXECUTOR_METRICS", "127.0.0.3:0")
    assert metrics(path) == {"executor": "127.0.0.3:0", "scheduler": "127.0.0.2:0"}


def test_the_metrics_address_of_all_services_is_the_gateways_in_a_cluster(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("PENSTOCK_METRICS", address)
        with pytest.raises(ConfigError, match=f"gateway: metrics: can not listen on {address}: Address already in use"):
            check(UpConfig(**FREE), None)
    check(UpConfig(**FREE), None)
    assert metrics(None) == {}


def test_the_gateways_doors_are_where_its_section_or_its_variables_put_them(file, monkeypatch):
    path = file("gateway: {http: '127.0.0.1:9200'}\n")
    assert doors(UpConfig(), None) == {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:8001"}
    assert doors(UpConfig(), path) == {"http": "127.0.0.1:9200", "grpc": "127.0.0.1:8001"}
    monkeypatch.setenv("PENSTOCK_GRPC", "127.0.0.1:9301")
    monkeypatch.setenv("PENSTOCK_GATEWAY_HTTP", "127.0.0.1:9300")
    assert doors(UpConfig(), path) == {"http": "127.0.0.1:9300", "grpc": "127.0.0.1:9301"}
    # What is said to the cluster goes before, be it the default.
    assert doors(UpConfig(http="127.0.0.1:8000"), path) == {"http": "127.0.0.1:8000", "grpc": "127.0.0.1:9301"}


def test_a_taken_port_is_called_by_the_setting_that_names_it(file):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"^gateway: http: can not listen on {address}"):
            check(UpConfig(grpc="127.0.0.1:0"), file(f"gateway: {{http: '{address}'}}\n"))


def test_keys_that_can_not_be_read_are_told_before_a_model_is_loaded(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartError, match=f"^api_keys: can not read {tmp_path}/keys.yaml: No such file"):
        check(UpConfig(**FREE), file("gateway: {api_keys: keys.yaml}\n"))


@pytest.mark.parametrize("service", ["gateway", "tokenizer", "scheduler", "executor"])
def test_every_services_section_is_read(file, service):
    with pytest.raises(ConfigError, match=f"{service}: unknown setting grace_secods; did you mean grace_seconds"):
        check(UpConfig(**FREE), file(f"{service}: {{grace_secods: 1}}\n"))
    with pytest.raises(CycloptsError, match=r"(?s)grace.seconds.*soon"):
        check(UpConfig(**FREE), file(f"{service}: {{grace_seconds: soon}}\n"))
    with pytest.raises(ConfigError, match=f"{service}: metrics: can not listen on nowhere"):
        check(UpConfig(**FREE), file(f"{service}: {{metrics: nowhere}}\n"))


def test_a_services_environment_is_read(monkeypatch):
    monkeypatch.setenv("PENSTOCK_GATEWAY_MAX_CHOICES", "some")
    with pytest.raises(CycloptsError, match=r"(?s)MAX.CHOICES.*some"):
        check(UpConfig(**FREE), None)


def test_the_model_is_not_looked_for_before_that(file, monkeypatch):
    monkeypatch.setattr("penstock.cli.up.resolve", lambda model: pytest.fail(f"{model} was looked for"))
    with pytest.raises(ConfigError, match="--http"):
        up("some/model", settings=UpConfig(http="nonsense"))
    with pytest.raises(ConfigError, match="unknown setting"):
        up("some/model", config=file("gateway: {max_choses: 1}\n"), settings=UpConfig(**FREE))
