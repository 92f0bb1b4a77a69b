"""`penstock bench serve` against doors that answer by rule, over real sockets."""

import asyncio
import json
import socket
import threading

import grpc
import grpc.aio
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.bench.http_stream import Door
from penstock.cli.bench.http_target import HttpTarget
from penstock.cli.bench.options import Work
from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.serve import serve
from penstock.common.config import ConfigError
from penstock.common.service import StartError
from penstock.v1 import inference_pb2, inference_pb2_grpc, models_pb2, models_pb2_grpc


def answer_to(prompt):
    """The rule: an answer counts on from the prompt's last id."""
    return prompt[-1] + 1


class Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self):
        self.requests = []

    async def Generate(self, request, context):  # noqa: N802 - the name in the proto
        self.requests.append(request)
        if request.prompt.token_ids.ids[0] == 666:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")
        first = answer_to(request.prompt.token_ids.ids)
        ids = list(range(first, first + request.stopping.max_tokens))
        if request.prompt.token_ids.ids[0] == 13:
            ids.pop()
        yield inference_pb2.GenerateResponse(token_ids=ids[:1])
        if ids[1:]:
            yield inference_pb2.GenerateResponse(token_ids=ids[1:])
        yield inference_pb2.GenerateResponse(finish=inference_pb2.Finish(reason=inference_pb2.FINISH_REASON_LENGTH))
        yield inference_pb2.GenerateResponse(closing=inference_pb2.Closing())


class Models(models_pb2_grpc.ModelsServicer):
    names = ("small",)
    dtypes = ("f32",)

    async def ListModels(self, request, context):  # noqa: N802 - the name in the proto
        executors = [models_pb2.ModelExecutor(backend="fake", dtype=dtype) for dtype in self.dtypes]
        return models_pb2.ListModelsResponse(
            models=[models_pb2.Model(name=name, vocabulary_size=768, executors=executors) for name in self.names]
        )


@pytest.fixture
def in_background():
    """Runs a coroutine function's server in a loop of its own thread: the targets bring a loop of their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture
def grpc_door(in_background):
    inference, models = Inference(), Models()

    async def start():
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(inference, server)
        models_pb2_grpc.add_ModelsServicer_to_server(models, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, f"127.0.0.1:{port}"

    server, address = in_background(start())
    yield address, inference, models
    in_background(server.stop(0))


@pytest.fixture
def http_door():
    bodies = []
    small = {"id": "small", "vocabulary_size": 768, "executors": [{"backend": "fake", "device": "cpu", "dtype": "f32"}]}

    async def models(request):
        return JSONResponse({"object": "list", "data": [small]})

    async def completions(request):
        body = json.loads(await request.body())
        bodies.append(body)
        if body["prompt"][0] == 666:
            return JSONResponse({"error": {"message": "too much"}}, status_code=429)
        return StreamingResponse(events(body), media_type="text/event-stream")

    async def events(body):
        first = answer_to(body["prompt"])
        ids = list(range(first, first + body["max_tokens"]))
        yield ": keepalive\n\n"
        for part in (ids[:1], ids[1:]):
            event = (
                f"data: {json.dumps({'choices': [{'index': 0, 'text': 'é', 'token_ids': part}]}, ensure_ascii=False)}\n\n".encode()
            )
            yield event[:25]
            yield event[25:]
        if body["prompt"][0] == 13:
            yield 'data: {"error": {"message": "the engine died"}}\n\n'
            return
        yield 'data: {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'

    app = Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])])
    bound = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
    thread.start()
    yield f"127.0.0.1:{bound.getsockname()[1]}", bodies, small
    server.should_exit = True
    thread.join(10)
    bound.close()


def connect(scheme, address, *, prefix_cache=True, model=None):
    if scheme == "grpc":
        return GrpcTarget(address, model=model, prefix_cache=prefix_cache, timeout=20)
    return HttpTarget(Door(address), model=model, vocabulary=768, prefix_cache=prefix_cache, timeout=20)


@pytest.fixture(params=["grpc", "http"])
def door(request):
    return request.param, request.getfixturevalue(f"{request.param}_door")[0]


def test_ids_and_times_come_back_in_order_of_the_requests(door):
    target = connect(*door)
    ended = []
    timelines = target.run([Request([5, 6, n], 3) for n in range(10, 20)], lambda: ended.append(1))
    target.close()
    assert [t.ids for t in timelines] == [[n + 1, n + 2, n + 3] for n in range(10, 20)]
    assert [t.error for t in timelines] == [None] * 10
    assert all(t.sent <= t.arrivals[0][0] <= t.arrivals[-1][0] <= t.ended for t in timelines)
    assert len(ended) == 10


def test_requests_are_sent_at_their_time(door):
    target = connect(*door)
    early, late = target.run([Request([1], 2), Request([1], 2, at=0.3)], lambda: None)
    target.close()
    assert late.sent - early.sent >= 0.25


def test_a_refused_request_is_told_and_harms_no_other(door):
    target = connect(*door)
    refused, fine = target.run([Request([666], 2), Request([1], 2)], lambda: None)
    target.close()
    assert "too much" in refused.error
    assert fine.error is None


def test_too_few_tokens_are_a_failure(door):
    target = connect(*door)
    (short,) = target.run([Request([13], 3)], lambda: None)
    target.close()
    assert short.error in {"2 tokens came where 3 were asked for", "the engine died"}


def test_greedy_exact_lengths_and_a_salt_of_its_own_are_asked_for_over_grpc(grpc_door):
    address, inference, _ = grpc_door
    for prefix_cache in (True, False):
        target = connect("grpc", address, prefix_cache=prefix_cache)
        target.run([Request([1], 2), Request([1], 2)], lambda: None)
        target.close()
    for request in inference.requests:
        assert request.sampling.HasField("temperature")
        assert request.sampling.temperature == 0
        assert request.stopping.max_tokens == 2
        assert request.stopping.ignore_eos
    assert [bool(r.cache_salt) for r in inference.requests] == [False, False, True, True]
    assert len({r.cache_salt for r in inference.requests[2:]}) == 2


def test_greedy_exact_lengths_and_a_salt_of_its_own_are_asked_for_over_http(http_door):
    address, bodies, _ = http_door
    for prefix_cache in (True, False):
        target = connect("http", address, prefix_cache=prefix_cache)
        target.run([Request([1], 2)], lambda: None)
        target.close()
    assert [(b["temperature"], b["max_tokens"], b["ignore_eos"], b["return_token_ids"]) for b in bodies] == [(0, 2, True, True)] * 2
    assert ["cache_salt" in b for b in bodies] == [False, True]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_no_suite_is_told_in_one_line(scheme):
    with pytest.raises(StartError, match=r"^--target: .*127\.0\.0\.1:9.*(Connection refused|Connect call failed)"):
        connect(scheme, "127.0.0.1:9")


def test_an_unknown_model_is_refused_with_those_there_are(door):
    with pytest.raises(StartError, match=r"--model: must be one of .*: small"):
        connect(*door, model="large")


def test_the_model_must_be_named_where_there_are_two(grpc_door):
    grpc_door[2].names = ("small", "large")
    with pytest.raises(StartError, match="small, large"):
        connect("grpc", grpc_door[0])
    target = connect("grpc", grpc_door[0], model="large")
    target.close()


def test_another_precision_than_the_suite_runs_is_refused(door, capsys):
    scheme, address = door
    target = f"{scheme}://{address}"
    with pytest.raises(StartError, match=r"--dtype: .* runs f32, and int8 was asked for"):
        serve(target=target, dtype="int8")
    with pytest.raises(StartError, match=r"--backend: .* runs fake, and torch was asked for"):
        serve(target=target, backend="torch")
    for dtype in ("f32", "auto"):
        work = Work(scenario=("decode-b8",), repeats=1, as_json=True)
        assert serve(target=target, dtype=dtype, vocabulary=10**9, work=work) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["engine"], told["dtype"], told["backend"]) == (f"penstock-{scheme}", "f32", "fake")


def test_of_a_server_that_does_not_tell_no_precision_is_claimed(http_door):
    address, _, small = http_door
    del small["executors"], small["vocabulary_size"]
    with pytest.raises(StartError, match=r"--dtype: .* does not tell what it runs"):
        serve(target=f"http://{address}", dtype="f32")
    target = connect("http", address)
    assert (target.description.dtype, target.description.backend, target.description.vocabulary) == ("unknown", "unknown", 768)


def test_executors_that_differ_are_told_and_not_taken_for_one(grpc_door, monkeypatch):
    monkeypatch.setattr(Models, "dtypes", ("f32", "int8"))
    target = connect("grpc", grpc_door[0])
    assert target.description.dtype == "f32+int8"
    target.close()


def test_an_address_alone_is_a_grpc_door(grpc_door, capsys):
    work = Work(scenario=("decode-b1",), repeats=1, as_json=True)
    assert serve(target=grpc_door[0], work=work) == 0
    assert json.loads(capsys.readouterr().out)["engine"] == "penstock-grpc"


@pytest.mark.parametrize("target", ["nonsense", "ftp://127.0.0.1:8001", "grpc://127.0.0.1", "grpc://"])
def test_a_target_that_is_none_is_refused(target):
    with pytest.raises(ConfigError, match=r"--target: must be HOST:PORT, or grpc://, grpcs://, http:// or https:// and HOST:PORT"):
        serve(target=target)


@pytest.mark.parametrize("key", ["é", "two\nlines"])
@pytest.mark.parametrize("target", ["grpc://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_key_that_can_not_be_sent_is_refused_and_not_told(target, key):
    with pytest.raises(
        ConfigError, match=r"^--api-key: must be printable ASCII, in one line: metadata and headers hold nothing else$"
    ):
        serve(target=target, api_key=key)
