"""What every server of the suite has: health with Watch, reflection, channel arguments that gRPC knows, errors as statuses."""

import asyncio
import contextlib
import re
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf import descriptor_pb2
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from penstock.common import errors
from penstock.common.channel import CLIENT_OPTIONS, connect, leave, server_options, why_ended
from penstock.common.server import GrpcServer
from penstock.executor.config import ExecutorConfig
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import GatewayServer
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer
from penstock.v1 import models_pb2, models_pb2_grpc

SERVICE = "penstock.v1.Models"
Health = health_pb2.HealthCheckResponse


class Models(models_pb2_grpc.ModelsServicer):
    """Fails with what it is told to."""

    error: Exception = errors.UnknownModel("no model")

    async def GetModel(self, request, context):  # noqa: N802 - the name in the proto
        raise self.error


@asynccontextmanager
async def running(**options):
    server, servicer = GrpcServer(**options), Models()
    server.add(models_pb2_grpc.add_ModelsServicer_to_server, servicer, SERVICE)
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with connect(address) as channel:
            yield server, servicer, channel
    finally:
        await server.stop(0)


async def test_why_an_address_can_not_be_listened_on_is_the_systems_word():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RuntimeError, match=r"^Address already in use$"):
            GrpcServer().listen(address)
    with pytest.raises(RuntimeError, match=r"^Cannot assign requested address$"):
        GrpcServer().listen("192.0.2.1:0")


async def test_health_is_watched_from_start_to_drain():
    async with running() as (server, _, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == Health.NOT_SERVING
        await server.set_serving(serving=True)
        assert (await watch.read()).status == Health.SERVING
        stopping = asyncio.create_task(server.stop(5))
        assert (await watch.read()).status == Health.NOT_SERVING
        watch.cancel()
        await stopping


async def test_a_write_to_a_stream_that_has_ended_is_told_as_its_end_and_not_as_a_defect_of_grpc():
    async with running() as (_, _, channel):
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        await watch.read()
        watch._cython_call.set_internal_error("ExecuteBatchError")  # as grpc.aio does where a write fails
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await watch.read()
        assert why_ended(failed.value) == "the stream ended while it was written to: the other end closed it, or is gone"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="none"))
        assert why_ended(refused.value).startswith("NOT_FOUND: ")


@pytest.mark.parametrize("service", ["", SERVICE])
async def test_health_is_told_of_the_server_and_of_each_service(service):
    async with running() as (server, _, channel):
        check = health_pb2_grpc.HealthStub(channel).Check
        assert (await check(health_pb2.HealthCheckRequest(service=service))).status == Health.NOT_SERVING
        await server.set_serving(serving=True)
        assert (await check(health_pb2.HealthCheckRequest(service=service))).status == Health.SERVING


async def test_reflection_lists_the_services_and_describes_them():
    async with running() as (_, _, channel):
        ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        call = ask()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        listed = {service.name for service in (await call.read()).list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= listed
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
        raw = (await call.read()).file_descriptor_response.file_descriptor_proto
        files = [descriptor_pb2.FileDescriptorProto.FromString(one) for one in raw]
        assert any(file.package == "penstock.v1" for file in files)
        await call.done_writing()


# These share their status with another that is as good to a client.
SHARED = {errors.InvalidRequest, errors.UnsupportedField, errors.ContextOverflow, errors.UnknownExecutor}


@pytest.mark.parametrize("kind", [kind for kind in errors.STATUS if kind not in SHARED])
async def test_every_error_has_its_status_and_comes_back_as_itself(kind):
    async with running() as (_, servicer, channel):
        again = kind in {errors.Overloaded, errors.Unavailable}
        servicer.error = kind("words", 2.5) if again else kind("words")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await models_pb2_grpc.ModelsStub(channel).GetModel(models_pb2.GetModelRequest())
        assert caught.value.code() is errors.STATUS[kind]
        status = rpc_status.from_call(caught.value)
        back = errors.error_from_status(caught.value.code(), status)
        assert type(back) is kind
        if again:
            assert back.retry_after == 2.5


async def test_a_wrong_field_is_named_in_the_details():
    async with running() as (_, servicer, channel):
        servicer.error = errors.InvalidRequest.field("sampling.top_p", "must be in (0, 1]")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await models_pb2_grpc.ModelsStub(channel).GetModel(models_pb2.GetModelRequest())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        bad = error_details_pb2.BadRequest()
        assert rpc_status.from_call(caught.value).details[0].Unpack(bad)
        assert [(v.field, v.description) for v in bad.field_violations] == [("sampling.top_p", "must be in (0, 1]")]


@pytest.mark.parametrize("error", [RuntimeError("the password is 1234"), errors.InternalError("the password is 1234")])
async def test_a_defect_tells_its_client_nothing_of_itself(error):
    async with running() as (_, servicer, channel):
        servicer.error = error
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await models_pb2_grpc.ModelsStub(channel).GetModel(models_pb2.GetModelRequest())
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "1234" not in str(caught.value)


FAILURES = [errors.InvalidRequest.field("n", "at most 8"), errors.Overloaded("full", 2.5), RuntimeError("a defect")]


@pytest.mark.parametrize("error", FAILURES)
async def test_a_failed_call_tells_the_id_under_which_the_logs_have_it(error):
    async with running() as (_, servicer, channel):
        servicer.error = error
        told = []
        for metadata in ((("x-request-id", "mine"),), ()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await models_pb2_grpc.ModelsStub(channel).GetModel(models_pb2.GetModelRequest(), metadata=metadata)
            trailing = dict(caught.value.trailing_metadata())
            assert rpc_status.from_call(caught.value) is not None
            told.append(trailing["x-request-id"])
        given, drawn = told
        assert given == "mine"
        assert len(drawn) == 32


async def test_a_message_beyond_the_servers_bound_is_refused():
    async with running(max_receive_bytes=1000) as (_, _, channel):
        get = models_pb2_grpc.ModelsStub(channel).GetModel
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(models_pb2.GetModelRequest(name="x" * 2000))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_second_server_can_not_take_the_port():
    async with running():
        first, second = GrpcServer(), GrpcServer()
        address = first.listen("127.0.0.1:0")
        await first.start()
        with pytest.raises(RuntimeError):
            second.listen(address)
        await first.stop(0)


@pytest.mark.parametrize("address", ["127.0.0.1", "8001", "127.0.0.1:65536", "127.0.0.1:99999", "127.0.0.1:http", ""])
async def test_what_is_no_address_is_refused(address):
    with pytest.raises(RuntimeError, match="not HOST:PORT"):
        GrpcServer().listen(address)


async def answer_and_end(_, context):
    for _ in range(3):
        await context.write(b"unread")


async def test_a_stream_whose_other_end_has_left_amid_a_write_keeps_no_connection():
    server = grpc.aio.server(options=server_options())
    handler = grpc.stream_stream_rpc_method_handler(answer_and_end)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Ends", {"Talk": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    def connections():
        found = psutil.Process().net_connections("tcp")
        return [c for c in found if c.raddr and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED]

    for _ in range(10):
        async with connect(f"127.0.0.1:{port}") as channel:
            call = channel.stream_stream("/test.Ends/Talk")()
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                while True:
                    await call.write(b"more")
            leave(call)
        del call, channel
    async with asyncio.timeout(10):
        while connections():  # noqa: ASYNC110 - the kernel sets no event
            await asyncio.sleep(0.01)
    await server.stop(0)


def test_every_channel_argument_is_one_that_grpc_knows():
    """An unknown argument is ignored in silence. The library holds the names of those that it reads."""
    library = next(Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")).read_bytes()
    known = {found.decode() for found in re.findall(rb"grpc\.[a-z0-9_.]+", library)}
    for name, _ in [*CLIENT_OPTIONS, *server_options()]:
        assert name in known, name


@pytest.fixture
def options_of(monkeypatch):
    """The channel arguments with which a service starts its server."""
    given, make = [], grpc.aio.server

    def server(*, options, **others):
        given.append(dict(options))
        return make(options=options, **others)

    async def started(service):
        await service.start()
        await service.close()
        return given.pop()

    monkeypatch.setattr(grpc.aio, "server", server)
    return started


async def test_channel_arguments_are_what_was_meant(options_of):
    free, nobody = "127.0.0.1:0", "127.0.0.1:1"
    client = dict(CLIENT_OPTIONS)
    doors = GatewayConfig(http=free, grpc=free, scheduler=nobody, tokenizer=nobody, max_body_bytes=12_345)
    server = await options_of(GatewayServer(doors))
    within = await options_of(SchedulerServer(SchedulerConfig(listen=free)))
    assert server["grpc.max_receive_message_length"] == 12_345
    assert within["grpc.max_receive_message_length"] == client["grpc.max_send_message_length"]
    assert server["grpc.so_reuseport"] == 0
    # A server that is pinged more often than it allows answers with GOAWAY.
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_ping_interval_without_data_ms"]
    two_leases = 2000 * min(ExecutorConfig(model="builtin").handoff_lease_seconds, SchedulerConfig().lease_seconds)
    for end in (client, within):
        assert end["grpc.keepalive_time_ms"] + end["grpc.keepalive_timeout_ms"] < two_leases
    assert server["grpc.keepalive_time_ms"] > within["grpc.keepalive_time_ms"]
    assert client["grpc.min_reconnect_backoff_ms"] <= client["grpc.max_reconnect_backoff_ms"]
    # gRPC lengthens a pause by up to a fifth.
    assert 1.2 * client["grpc.max_reconnect_backoff_ms"] < 500 * SchedulerConfig().settle_seconds
