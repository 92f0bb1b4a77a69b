import asyncio

import pytest

from penstock.cli.health import health
from penstock.common.config import ConfigError
from penstock.common.server import GrpcServer


def test_health_is_the_servers_own(capsys):
    async def main():
        server = GrpcServer()
        address = server.listen("127.0.0.1:0")
        await server.start()
        before = await asyncio.to_thread(health, address)
        await server.set_serving(serving=True)
        after = await asyncio.to_thread(health, address)
        unknown = await asyncio.to_thread(health, address, service="no.Such")
        await server.stop(0)
        return before, after, unknown, await asyncio.to_thread(health, address, timeout=1)

    assert asyncio.run(main()) == (1, 0, 1, 1)
    told = capsys.readouterr()
    assert told.out.split() == ["NOT_SERVING", "SERVING"]
    assert "NOT_FOUND: it has no service no.Such" in told.err
    assert "UNAVAILABLE" in told.err


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="HOST:PORT"):
        health("nonsense")
