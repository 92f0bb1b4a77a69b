"""What is wrong is refused in both doors, before memory is taken, by the field's name and with what would be right."""

import asyncio
import contextlib
import gzip
import json
import math
import re
import tracemalloc

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from penstock.client import ContextOverflow
from penstock.client.errors import from_rpc
from penstock.v1 import inference_pb2

PROMPT = {"text": "Tell me"}

# What is wrong, as a gRPC request's fields and as an HTTP body's; then the field as each door names it.
TABLE = {
    "empty prompt": ({"prompt": {"text": ""}}, {"prompt": ""}, "prompt", "prompt"),
    "no ids": ({"prompt": {"token_ids": {}}}, {"prompt": []}, "prompt", "prompt"),
    "id outside the vocabulary": ({"prompt": {"token_ids": {"ids": [1, 300]}}}, {"prompt": [1, 300]}, "prompt", "prompt"),
    "longer than the context": ({"prompt": {"text": "x" * 5000}}, {"prompt": "x" * 5000}, "prompt", "prompt"),
    "as long as the context": ({"prompt": {"text": "x" * 4096}}, {"prompt": "x" * 4096}, "prompt", "prompt"),
    "ids longer than the context": ({"prompt": {"token_ids": {"ids": [1] * 4097}}}, {"prompt": [1] * 4097}, "prompt", "prompt"),
    "ids as long as the context": ({"prompt": {"token_ids": {"ids": [1] * 4096}}}, {"prompt": [[1] * 4096]}, "prompt", "prompt"),
    "context and answer": ({"stopping": {"max_tokens": 4095}}, {"max_tokens": 4095}, "stopping.max_tokens", "max_tokens"),
    "no answer": ({"stopping": {"max_tokens": 0}}, {"max_tokens": 0}, "stopping.max_tokens", "max_tokens"),
    "temperature": ({"sampling": {"temperature": -1}}, {"temperature": -1}, "sampling.temperature", "temperature"),
    "nan": ({"sampling": {"temperature": math.nan}}, {"temperature": math.nan}, "sampling.temperature", "temperature"),
    "infinity": ({"sampling": {"min_p": math.inf}}, {"min_p": math.inf}, "sampling.min_p", "min_p"),
    "top_p": ({"sampling": {"top_p": 0}}, {"top_p": 0}, "sampling.top_p", "top_p"),
    "min_p": ({"sampling": {"min_p": 1.5}}, {"min_p": 1.5}, "sampling.min_p", "min_p"),
    "presence": ({"sampling": {"presence_penalty": 3}}, {"presence_penalty": 3}, "sampling.presence_penalty", "presence_penalty"),
    "top_p that is 0 in single precision": ({"sampling": {"top_p": 1e-50}}, {"top_p": 1e-50}, "sampling.top_p", "top_p"),
    "repetition that makes logits overflow": (
        {"sampling": {"repetition_penalty": 0.001}},
        {"repetition_penalty": 0.001},
        "sampling.repetition_penalty",
        "repetition_penalty",
    ),
    "repetition": (
        {"sampling": {"repetition_penalty": 0}},
        {"repetition_penalty": 0},
        "sampling.repetition_penalty",
        "repetition_penalty",
    ),
    "tiny repetition": (
        {"sampling": {"repetition_penalty": 1e-40}},
        {"repetition_penalty": 1e-40},
        "sampling.repetition_penalty",
        "repetition_penalty",
    ),
    "bias": ({"sampling": {"logit_bias": {5: 101}}}, {"logit_bias": {"5": 101}}, "sampling.logit_bias[5]", "logit_bias[5]"),
    "bias of no token": ({"sampling": {"logit_bias": {999: 1}}}, {"logit_bias": {"999": 1}}, "sampling.logit_bias", "logit_bias"),
    "many stops": ({"stopping": {"stop": ["a"] * 17}}, {"stop": ["a"] * 17}, "stopping.stop", "stop"),
    "empty stop": ({"stopping": {"stop": ["a", ""]}}, {"stop": ["a", ""]}, "stopping.stop[1]", "stop[1]"),
    "long stop": ({"stopping": {"stop": ["a" * 1025]}}, {"stop": "a" * 1025}, "stopping.stop[0]", "stop[0]"),
    "many stop ids": (
        {"stopping": {"stop_token_ids": [1] * 65}},
        {"stop_token_ids": [1] * 65},
        "stopping.stop_token_ids",
        "stop_token_ids",
    ),
    "stop id": ({"stopping": {"stop_token_ids": [300]}}, {"stop_token_ids": [300]}, "stopping.stop_token_ids", "stop_token_ids"),
    "min over max": (
        {"stopping": {"max_tokens": 2, "min_tokens": 3}},
        {"max_tokens": 2, "min_tokens": 3},
        "stopping.min_tokens",
        "min_tokens",
    ),
    "logprobs": ({"reporting": {"logprobs": 21}}, {"logprobs": 21}, "reporting.logprobs", "logprobs"),
    "many choices": ({"n": 17}, {"n": 17}, "n", "n"),
    "budget": ({"n": 10, "stopping": {"max_tokens": 30000}}, {"n": 10, "max_tokens": 30000}, "stopping.max_tokens", "max_tokens"),
    "priority": ({"priority": 101}, {"priority": 101}, "priority", "priority"),
    "long salt": ({"cache_salt": "s" * 257}, {"cache_salt": "s" * 257}, "cache_salt", "cache_salt"),
}


INTEGERS = ("top_k", "seed", "n", "max_tokens", "min_tokens", "prompt_logprobs", "priority", "logprobs")


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**4200], ids=["large", "small", "larger"])
@pytest.mark.parametrize("fields", [*((name,) for name in INTEGERS), ("n", "max_tokens"), ("min_tokens", "max_tokens")])
async def test_whole_numbers_of_any_size_are_refused_by_name(suite, fields, number):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for page, prompt in (
            ("completions", {"prompt": "x"}),
            ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ):
            body = {"model": "story", **prompt, **dict.fromkeys(fields, number)}
            reply = await client.post(f"/v1/{page}", json=body)
            assert reply.status_code == 400
            assert reply.json()["error"]["param"] in fields
            assert len(reply.text) < 1000


async def grpc_failure(suite, request):
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Generate(request).read()
    return failure.value


def violations(error):
    bad = error_details_pb2.BadRequest()
    assert rpc_status.from_call(error).details[0].Unpack(bad)
    return {v.field: v.description for v in bad.field_violations}


OVERFLOWS = [case for case in TABLE if "context" in case]


@pytest.mark.parametrize("case", OVERFLOWS)
async def test_what_the_context_can_not_hold_is_told_apart_from_other_faults(suite, case):
    fields, body, _, _ = TABLE[case]
    error = await grpc_failure(suite, inference_pb2.GenerateRequest(**{"model": "story", "prompt": PROMPT} | fields))
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(error).details[1].Unpack(info)
    assert (info.reason, info.domain) == ("CONTEXT_OVERFLOW", "penstock.v1")
    assert type(from_rpc(error)) is ContextOverflow
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "story", "prompt": "Tell me"} | body)
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    for words in (error.details(), reply.json()["error"]["message"]):
        assert "this model's maximum context length is 4096 tokens" in words


async def test_a_least_length_that_there_is_no_room_for_is_refused(suite):
    stopping = inference_pb2.Stopping(min_tokens=100_000)
    error = await grpc_failure(suite, inference_pb2.GenerateRequest(model="story", prompt=PROMPT, stopping=stopping))
    assert "at most" in violations(error)["stopping.min_tokens"]
    body = {"model": "story", "messages": [{"role": "user", "content": "x"}], "min_tokens": 100_000}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/chat/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "min_tokens")


@pytest.mark.parametrize("case", TABLE)
async def test_both_doors_name_the_field(suite, case):
    fields, body, grpc_name, http_name = TABLE[case]
    error = await grpc_failure(suite, inference_pb2.GenerateRequest(**{"model": "story", "prompt": PROMPT} | fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert grpc_name in violations(error)
    assert violations(error)[grpc_name]
    async with httpx.AsyncClient(base_url=suite.http) as client:
        content = json.dumps({"model": "story", "prompt": "Tell me"} | body)
        reply = await client.post("/v1/completions", content=content)
    assert reply.status_code == 400, reply.text
    told = reply.json()["error"]
    assert told["param"] == http_name
    assert told["type"] == "invalid_request_error"
    assert http_name in told["message"]
    assert not suite.scheduler.placings
    await suite.rest()


HTTP_ONLY = {
    "wrong type": ({"temperature": "hot"}, "temperature"),
    "bool for a number": ({"n": True}, "n"),
    "prompt of a wrong type": ({"prompt": {"a": 1}}, "prompt"),
    "mixed prompt": ({"prompt": ["a", 1]}, "prompt"),
    "too many prompts": ({"prompt": ["a"] * 257}, "prompt"),
    "misspelt": ({"temprature": 1}, "temprature"),
    "best_of": ({"best_of": 3}, "best_of"),
    "suffix": ({"suffix": "x"}, "suffix"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "json": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "bias by text": ({"logit_bias": {"word": 1}}, "logit_bias"),
    "prompts and budget": ({"prompt": ["a"] * 200, "max_tokens": 2000}, "max_tokens"),
    "best_of that is no number": ({"best_of": True}, "best_of"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
}
UNSUPPORTED = {"best_of", "suffix", "tools", "json", "best_of that is no number"}
# vLLM's: some are spelt like a field that means something else.
UNSUPPORTED_OF_VLLM = {
    "truncate_prompt_tokens": 5,
    "length_penalty": 0.5,
    "allowed_token_ids": [1],
    "add_special_tokens": False,
    "return_tokens_as_token_ids": True,
    "spaces_between_special_tokens": False,
    "guided_json": {},
    "use_beam_search": True,
}
HTTP_ONLY |= {name: ({name: value}, name) for name, value in UNSUPPORTED_OF_VLLM.items()}
UNSUPPORTED |= UNSUPPORTED_OF_VLLM.keys()


@pytest.mark.parametrize("case", HTTP_ONLY)
async def test_http_refuses_what_only_it_can_be_sent(suite, case):
    body, field = HTTP_ONLY[case]
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "story", "prompt": "Tell me"} | body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == field
    assert reply.json()["error"]["code"] == ("unsupported_parameter" if case in UNSUPPORTED else "invalid_value")


@pytest.mark.parametrize(("role", "status"), [("user", 400), ("system", 400), ("assistant", 200)])
async def test_only_an_answer_may_be_without_content(suite, role, status):
    body = {"model": "story", "messages": [{"role": "user", "content": "x"}, {"role": role}], "max_tokens": 3}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/chat/completions", json=body)
    assert reply.status_code == status
    assert status == 200 or reply.json()["error"]["param"] == "messages[1].content"


async def test_a_misspelt_field_is_told_the_right_one(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "story", "prompt": "x", "temprature": 1})
    assert "did you mean 'temperature'" in reply.json()["error"]["message"]


async def test_fields_that_ask_for_nothing_are_taken(suite):
    body = {"user": "u", "store": False, "metadata": {}, "service_tier": "auto", "parallel_tool_calls": True, "tools": []}
    body |= {"response_format": {"type": "text"}, "best_of": 1, "suffix": None, "seed": -5, "top_k": -1}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "story", "prompt": "x"} | body)
    assert reply.status_code == 200, reply.text


async def test_an_unknown_model_is_not_found_in_both_doors(suite):
    error = await grpc_failure(suite, inference_pb2.GenerateRequest(model="other", prompt=PROMPT))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"


async def test_text_that_is_no_unicode_is_refused_in_both_doors(suite):
    raw = suite.channel.unary_stream("/penstock.v1.Inference/Generate", request_serializer=bytes)
    call = raw(b"\x12\x03\x0a\x01\xff")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call.read()
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for content in (b'{"model":"story","prompt":"\xff"}', b'{"model":"story","prompt":"\\ud800"}', b"{", b"[]"):
            assert (await client.post("/v1/completions", content=content)).status_code == 400


async def test_a_template_that_never_ends_is_refused_by_the_field_it_is_about(suite):
    request = inference_pb2.ChatRequest(conversation={"messages": [{"role": "user", "content": "loop forever"}]})
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Chat(request).read()
    assert "conversation.messages" in violations(failure.value)
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(
            "/v1/chat/completions", json={"model": "story", "messages": [{"role": "user", "content": "loop forever"}]}
        )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "messages")


@contextlib.contextmanager
def peak_memory():
    """Memory that was taken at most within the block, by Python's own count."""
    tracemalloc.start()
    try:
        yield lambda: peak
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


async def test_a_body_of_100_mb_is_refused_and_never_held(suite):
    async def endless():
        for _ in range(100):
            yield b"x" * (1 << 20)

    reader, writer = await asyncio.open_connection(*suite.http.removeprefix("http://").split(":"))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n")
    answer = await reader.readuntil(b"request_too_large")  # before a byte of the body is sent
    assert answer.startswith(b"HTTP/1.1 413")
    writer.close()
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for length in ({}, {"content-length": str(100 << 20)}):
            with peak_memory() as peak:
                reply = await client.post("/v1/completions", content=endless(), headers=length)
            assert reply.status_code == 413
            assert peak() < 16 << 20
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Generate(inference_pb2.GenerateRequest(prompt={"text": "x" * (9 << 20)})).read()
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_other_requests_are_unharmed(suite):
    suite.executors[0].gate.clear()
    call = suite.inference.Generate(inference_pb2.GenerateRequest(prompt=PROMPT, stopping={"max_tokens": 40}))
    await suite.executors[0].started.wait()
    await grpc_failure(suite, inference_pb2.GenerateRequest(prompt={"text": ""}))
    suite.executors[0].gate.set()
    answers = [m async for m in call]
    assert answers[-1].closing.usage.completion_tokens == 40


async def test_with_keys_only_their_bearers_come_in(suite_with, tmp_path):
    keys = tmp_path / "keys.yaml"
    keys.write_text("secret-a: acme\nsecret-b: beta\n")
    async with suite_with(api_keys=str(keys)) as suite:
        error = await grpc_failure(suite, inference_pb2.GenerateRequest(prompt=PROMPT))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        call = suite.inference.Generate(
            inference_pb2.GenerateRequest(prompt=PROMPT, stopping={"max_tokens": 4}),
            metadata=(("authorization", "Bearer secret-a"),),
        )
        assert [m async for m in call]
        async with httpx.AsyncClient(base_url=suite.http) as client:
            body = {"model": "story", "prompt": "x"}
            assert (await client.post("/v1/completions", json=body)).status_code == 401
            assert (await client.get("/v1/models", headers={"authorization": "Bearer wrong"})).status_code == 401
            reply = await client.post("/v1/completions", json=body, headers={"authorization": "Bearer secret-b"})
            assert reply.status_code == 200
        assert [p.tenant for p in suite.scheduler.placings] == ["acme", "beta"]
        assert [s.tenant for s in suite.executors[0].all_started] == ["acme", "beta"]


@pytest.mark.parametrize("page", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize("codings", [["gzip"], ["GZIP, identity"], ["gzip", "identity"]])
async def test_a_compressed_body_is_refused_as_that(suite, page, codings):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        headers = [("Content-Encoding", coding) for coding in codings]
        reply = await client.post(page, content=gzip.compress(b'{"prompt": "x"}'), headers=headers)
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, "Content-Encoding", "unsupported_parameter")


@pytest.mark.parametrize("coding", ["identity", "Identity", "identity, identity", ""])
async def test_a_body_that_is_as_it_is_may_say_so(suite, coding):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        body = {"content": b'{"prompt": "x", "max_tokens": 1}', "headers": {"Content-Encoding": coding}}
        assert (await client.post("/v1/completions", **body)).status_code == 200


@pytest.mark.parametrize(
    "extra",
    [
        {"reasoning_effort": "none"},
        {"use_beam_search": False, "length_penalty": 1.0, "allowed_token_ids": [], "include_reasoning": True},
        {"verbosity": "medium"},
        {"logprobs": False, "top_logprobs": 0},
        {"prompt_cache_options": {"mode": "implicit"}},
        {"moderation": None},
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": None}},
    ],
    ids=repr,
)
async def test_what_asks_for_nothing_is_taken(suite, extra):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        assert (await client.post("/v1/chat/completions", json=body | extra)).status_code == 200


@pytest.mark.parametrize(
    ("page", "body", "field", "message"),
    [
        ("/v1/completions", {"prompt": "x", "max_completion_tokens": 3}, "max_completion_tokens", "did you mean 'max_tokens'"),
        ("/v1/completions", {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty", r"in \[0.01, 10\]"),
        ("/v1/chat/completions", {"messages": ["x"]}, "messages[0]", "must be an object"),
        ("/v1/chat/completions", {"messages": [], "stream": True, "stream_options": True}, "stream_options", "must be an object"),
        ("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"usage": 1}}, "stream_options.usage", "no field"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "moderation": {"a": 1}},
            "moderation",
            "not supp",
        ),
        ("/tokenize", {"prompt": ["a", "b"]}, "prompt", "must be a text$"),
        ("/tokenize", {"prompt": "a", "return_token_str": True}, "return_token_str", "no field"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_is_wrong_is_told_in_the_words_of_the_page(suite, page, body, field, message):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(page, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert re.search(message, error["message"])


KWARGS = {"budget": 5, "style": "brief", "thinking": False}


async def test_both_doors_hand_on_what_a_chat_template_is_to_read(suite):
    turns = [{"role": "user", "content": "hi"}]
    seen = "<user>hi[budget=5.0][style=brief][thinking=False]"
    conversation = inference_pb2.Conversation(messages=[inference_pb2.Message(**turns[0])], chat_template_kwargs=KWARGS)
    request = inference_pb2.CountTokensRequest(model="story", conversation=conversation, token_ids=True)
    assert bytes((await suite.inference.CountTokens(request)).token_ids).decode() == seen
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/tokenize", json={"model": "story", "messages": turns, "chat_template_kwargs": KWARGS})
        assert bytes(reply.json()["tokens"]).decode() == seen
        body = {"model": "story", "messages": turns, "chat_template_kwargs": KWARGS, "max_tokens": 1}
        reply = await client.post("/v1/chat/completions", json=body)
        assert reply.json()["usage"]["prompt_tokens"] == len(seen)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"style": [1]}, "texts, numbers, true, false and null"),
        ({"style": {}}, "texts, numbers, true, false and null"),
        ({"style": math.nan}, "numbers within"),
        ({"style": -(2.0**53) - 2}, "numbers within"),
        ({str(i): True for i in range(33)}, "at most 32 names; these are 33"),
    ],
)
async def test_what_no_chat_template_can_read_is_refused_by_both_doors(suite, kwargs, message):
    error = await refused_chat(suite, kwargs)
    assert error["param"].partition(".")[0] == "chat_template_kwargs"
    assert message in error["message"]
    conversation = inference_pb2.Conversation(messages=[inference_pb2.Message(role="user")], chat_template_kwargs=kwargs)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await suite.inference.Chat(inference_pb2.ChatRequest(model="story", conversation=conversation)).read()
    assert message in violations(failure.value)["conversation.chat_template_kwargs"]


@pytest.mark.parametrize("number", [2**53 + 1, 10**400])
async def test_whole_numbers_that_would_change_on_their_way_to_a_template_are_refused(suite, number):
    assert "numbers within" in (await refused_chat(suite, {"budget": number}))["message"]


async def refused_chat(suite, kwargs):
    body = {"model": "story", "messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": kwargs}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/chat/completions", content=json.dumps(body))
    assert reply.status_code == 400
    return reply.json()["error"]
