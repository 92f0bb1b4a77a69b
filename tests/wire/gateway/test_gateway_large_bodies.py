"""A bad body of a few megabytes is refused by its lengths, for little work and with a small answer: the loop serves others, too."""

import asyncio
import json

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from penstock.common.errors import MAX_VIOLATIONS, FieldViolation, InvalidRequest, status_of
from penstock.gateway.bounds import MAX_COUNTED_TOKENS
from penstock.gateway.grpc_door import messages as grpc_messages
from penstock.gateway.http_door import schemas
from penstock.v1 import inference_pb2

MANY = 300_000
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "x"}
BODIES = {
    "prompt of floats": (TEXT, {"prompt": [1.5] * MANY}, "prompt"),
    "prompt that ends wrong": (TEXT, {"prompt": [1] * 4000 + [1.5]}, "prompt"),
    "prompt of ids": (TEXT, {"prompt": [1] * MANY}, "prompt"),
    "prompts of ids": (TEXT, {"prompt": [[1] * MANY]}, "prompt"),
    "empty messages": (CHAT, {"messages": [{}] * MANY}, "messages"),
    "empty messages within the bound": (CHAT, {"messages": [{}] * 4096}, "messages[0].role"),
    "unknown keys of messages": (CHAT, {"messages": [USER | {f"k{i}": 1 for i in range(60)}] * 4096}, "messages[0].k0"),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [{}] * MANY}]}, "messages"),
    "stops of ints": (TEXT, {"prompt": "x", "stop": [1] * MANY}, "stop"),
    "stop ids": (TEXT, {"prompt": "x", "stop_token_ids": ["a"] * MANY}, "stop_token_ids"),
    "biases": (TEXT, {"prompt": "x", "logit_bias": {str(i): "a" for i in range(MANY)}}, "logit_bias"),
    "unknown keys": (TEXT, {"prompt": "x"} | {f"temperatur{i}": 1 for i in range(MANY)}, "body"),
    "a long key": (TEXT, {"prompt": "x", "k" * 4_000_000: 1}, "k" * 64),
    "stream options": (TEXT, {"prompt": "x", "stream_options": {f"k{i}": 1 for i in range(MANY)}}, "stream_options"),
    "tokens": ("/detokenize", {"tokens": [1.5] * MANY}, "tokens[0]"),
    "more tokens than are taken": ("/detokenize", {"tokens": [1] * (MAX_COUNTED_TOKENS + 1)}, "tokens"),
    "messages to count": ("/tokenize", {"messages": [{}] * MANY}, "messages"),
}


@pytest.fixture
def visited(monkeypatch):
    """How many violations are made and how many hints are looked for: what took the time."""
    count = {"violations": 0, "hints": 0}
    close_matches = schemas.difflib.get_close_matches

    class Counted(FieldViolation):
        def __init__(self, *fields):
            count["violations"] += 1
            super().__init__(*fields)

    def hint(name, *rest, **more):
        assert len(name) <= 64
        count["hints"] += 1
        return close_matches(name, *rest, **more)

    monkeypatch.setattr(schemas, "FieldViolation", Counted)
    monkeypatch.setattr(schemas.difflib, "get_close_matches", hint)
    return count


@pytest.mark.parametrize("case", BODIES)
async def test_the_work_and_the_answer_do_not_grow_with_the_body(suite, visited, case):
    path, body, param = BODIES[case]
    content = json.dumps({"model": "story"} | body)
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(path, content=content)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert len(reply.content) < 4096
    assert visited["violations"] <= 64
    assert visited["hints"] <= MAX_VIOLATIONS
    await suite.rest()


GRPC = {
    "conversation.messages": lambda r: r.conversation.messages.extend([inference_pb2.Message()] * 5000),
    "stopping.stop": lambda r: r.stopping.stop.extend(["a"] * 5000),
    "stopping.stop_token_ids": lambda r: r.stopping.stop_token_ids.extend([1] * 5000),
    "sampling.logit_bias": lambda r: r.sampling.logit_bias.update(dict.fromkeys(range(5000), 1.0)),
}


@pytest.mark.parametrize("field", GRPC)
async def test_grpc_looks_at_lengths_before_it_converts(suite, monkeypatch, field):
    made = []
    for name in ("Message", "Stopping", "Sampling"):
        monkeypatch.setattr(grpc_messages, name, lambda *fields, **named: made.append(fields))
    request = inference_pb2.ChatRequest()
    GRPC[field](request)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Chat(request).read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"{field}: at most" in failure.value.details()
    assert len(made) <= 2


async def test_many_violations_fit_into_a_status(suite):
    messages = [inference_pb2.Message(role="", content="한" * 100)] * 4096
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Chat(inference_pb2.ChatRequest(conversation={"messages": messages})).read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "and 4088 more" in failure.value.details()
    (packed,) = rpc_status.from_call(failure.value).details
    bad = error_details_pb2.BadRequest()
    assert packed.Unpack(bad)
    assert len(bad.field_violations) == MAX_VIOLATIONS


def test_a_status_stays_within_grpcs_metadata_whatever_it_tells():
    error = InvalidRequest(*(FieldViolation("field한" * 1000, "wrong \ud800 한" * 9000) for _ in range(100)))
    _, status = status_of(error)
    # Base64, and the message once more, each byte of it as %XX.
    assert len(status.SerializeToString()) * 4 / 3 + 3 * len(status.message.encode()) < 8192


async def test_calls_are_counted_before_their_bodies_are_read_and_for_so_long_only(suite_with):
    async with suite_with(max_live_requests=1, body_seconds=0.3) as suite:
        reader, writer = await asyncio.open_connection(*suite.http.removeprefix("http://").split(":"))
        writer.write(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        await suite.eventually(lambda: suite.gateway.counts()["calls"] == 1)
        async with httpx.AsyncClient(base_url=suite.http) as client:
            for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
                assert (await client.post(path, json={})).status_code == 429
        answer = await reader.read()  # to the end: the connection is closed behind it
        assert answer.startswith(b"HTTP/1.1 504")
        assert b'"code": "deadline_exceeded"' in answer
        writer.close()
        await suite.rest()


@pytest.mark.parametrize("path", [TEXT, CHAT, "/tokenize", "/detokenize"])
async def test_every_page_refuses_a_body_that_is_too_large_in_the_same_way(suite_with, path):
    async with suite_with(max_body_bytes=1 << 16) as suite, httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(path, content=b"x" * (8 << 20))
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("path", [TEXT, "/tokenize", "/v1/models"])
async def test_a_defect_is_an_error_in_openais_shape_that_tells_nothing_of_it(suite, monkeypatch, path):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(suite.gateway.admission.catalog, "models", broken)
    async with httpx.AsyncClient(base_url=suite.http) as client:
        method = "GET" if path == "/v1/models" else "POST"
        reply = await client.request(method, path, json={"prompt": "x"} if method == "POST" else None)
    assert reply.status_code == 500
    assert reply.json()["error"]["code"] == "internal_error"
    assert "secret" not in reply.text


@pytest.mark.parametrize("header", [b"gr\xfc\xdf", b"00-" + b"0" * 32 + b"-" + b"1" * 16 + b"-01", b"00-x"])
async def test_a_header_that_is_no_trace_is_left_out(suite, header):
    headers = {b"traceparent": header, b"x-request-id": b"id-\xfc"}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for path in (TEXT, "/tokenize"):
            reply = await client.post(path, json={"prompt": "x"}, headers=headers)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-request-id"] == "id-?"
    assert [p.traceparent for p in suite.scheduler.placings] == [""]


@pytest.mark.parametrize("key", ["0000000000042", "042", "+4", "4 ", "٤", ""])
async def test_a_bias_is_for_a_plain_decimal_id(suite, key):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(TEXT, json={"prompt": "x", "logit_bias": {key: 100}})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logit_bias")
