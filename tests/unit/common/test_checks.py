"""Settings that no service can work with are refused before it starts, by name."""

import math
import re

import pytest

from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.server import ExecutorServer
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import GatewayServer
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer
from penstock.tokenizer.config import TokenizerConfig
from penstock.tokenizer.server import TokenizerServer

IMPOSSIBLE = [
    (GatewayServer, GatewayConfig, {"max_live_requests": 0}, "more than 0"),
    (GatewayServer, GatewayConfig, {"max_attempts": 0}, "more than 0"),
    (GatewayServer, GatewayConfig, {"max_head_bytes": 0}, "more than 0"),
    (GatewayServer, GatewayConfig, {"head_seconds": 0}, "more than 0"),
    (GatewayServer, GatewayConfig, {"max_http_connections": 0}, "more than 0"),
    (GatewayServer, GatewayConfig, {"grace_seconds": -5}, "0 or more"),
    (GatewayServer, GatewayConfig, {"slow_reader_seconds": math.nan}, "more than 0"),
    (TokenizerServer, TokenizerConfig, {"template_workers": 0}, "more than 0"),
    (TokenizerServer, TokenizerConfig, {"template_seconds": math.inf}, "more than 0"),
    (SchedulerServer, SchedulerConfig, {"max_queued_requests": 0}, "more than 0"),
    (SchedulerServer, SchedulerConfig, {"settle_seconds": -1}, "0 or more"),
]


@pytest.mark.parametrize(("server", "config", "setting", "least"), IMPOSSIBLE, ids=repr)
async def test_a_number_that_no_service_can_work_with_is_refused_by_name(server, config, setting, least):
    ((name, value),) = setting.items()
    service = server(config(**setting))
    with pytest.raises(StartError, match=f"^{name} is {value}: it must be a finite number, {least}$"):
        await service.start()
    await service.close()


@pytest.mark.parametrize(
    ("server", "config", "setting", "why"),
    [
        (GatewayServer, GatewayConfig, {"scheduler": "foo"}, "scheduler: 'foo' is not HOST:PORT"),
        (GatewayServer, GatewayConfig, {"tokenizer": "127.0.0.1:0"}, "tokenizer: nothing can be reached at 127.0.0.1:0"),
        (GatewayServer, GatewayConfig, {"cors_origins": ("https://a.example https://b.example",)}, "cors_origins: 'https://a.ex"),
        (
            GatewayServer,
            GatewayConfig,
            {"cors_origins": ("https://a.example", "https://b.example/chat")},
            "'https://b.example/chat'",
        ),
        (GatewayServer, GatewayConfig, {"otlp_endpoint": "foo"}, "otlp_endpoint: 'foo' is no collector"),
        (SchedulerServer, SchedulerConfig, {"otlp_endpoint": "127.0.0.1"}, "otlp_endpoint: '127.0.0.1' is no collector"),
        (ExecutorServer, ExecutorConfig, {"backend": "fake", "scheduler": "here:"}, "scheduler: 'here:' is not HOST:PORT"),
    ],
    ids=repr,
)
async def test_what_can_never_be_reached_and_what_nobody_sends_is_refused_by_name(server, config, setting, why):
    service = server(config(**setting))
    with pytest.raises(StartError, match=re.escape(why)):
        await service.start()
    await service.close()


@pytest.mark.parametrize("name", ["grace_seconds", "model_memory_seconds"])
async def test_zero_is_taken_where_it_means_something(name):
    service = GatewayServer(GatewayConfig(http="127.0.0.1:0", grpc="127.0.0.1:0", **{name: 0}))
    await service.start()
    await service.close()
