import asyncio
import threading

import pytest
from fake_server import FakeServer

from penstock.common.server import GrpcServer
from penstock.v1 import inference_pb2_grpc as pb_grpc
from penstock.v1 import models_pb2_grpc


@pytest.fixture
def fake():
    """The server, on a loop of its own, so that a blocking client can talk to it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servicer = FakeServer()

    async def start():
        server = GrpcServer()
        server.add(pb_grpc.add_InferenceServicer_to_server, servicer, "penstock.v1.Inference")
        server.add(models_pb2_grpc.add_ModelsServicer_to_server, servicer, "penstock.v1.Models")
        address = server.listen("127.0.0.1:0")
        await server.start()
        return server, address

    server, servicer.address = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    yield servicer
    asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
