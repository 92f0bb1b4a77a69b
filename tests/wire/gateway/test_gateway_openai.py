"""The HTTP door as the real `openai` package sees it."""

import asyncio
import collections
import json
import socket

import httpx
import openai
import pytest

from penstock.gateway.http_door.connection import BoundedConnection


@pytest.fixture
async def client(suite):
    async with openai.AsyncOpenAI(base_url=f"{suite.http}/v1", api_key="none", max_retries=0) as made:
        yield made


def story(suite, tokens):
    return suite.story.encode()[:tokens].decode(errors="ignore")


async def test_models(suite, client):
    assert [m.id async for m in client.models.list()] == ["story"]
    assert (await client.models.retrieve("story")).owned_by == "penstock"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_chat_streamed_and_whole_are_the_same(suite, client):
    ask = {"model": "story", "messages": [{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 50}
    whole = await client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == story(suite, 50)
    assert whole.choices[0].finish_reason == "length"
    assert whole.id.startswith("chatcmpl-")
    chunks = [c async for c in await client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == story(suite, 50)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 50
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 2
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["length"]
    await suite.rest()


@pytest.mark.parametrize(
    "ask", [{"messages": [{"role": "user", "content": "Hi"}]}, {"prompt": ["One", "Twenty"]}], ids=["chat", "completions"]
)
async def test_chunks_tell_their_choices_counts_where_that_is_asked_for(suite, client, ask):
    page = client.chat.completions if "messages" in ask else client.completions
    ask = {"model": "story", "n": 2, "max_tokens": 30, "stream": True, "extra_body": {"return_token_ids": True}} | ask
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [c async for c in await page.create(**ask, stream_options=options)]
    told = collections.Counter()
    prompts = {}
    for chunk in chunks[:-1]:
        choice = chunk.choices[0]
        told[choice.index] += len(getattr(choice, "token_ids", ()))
        assert chunk.usage.completion_tokens == told[choice.index]
        assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens
        assert prompts.setdefault(choice.index, chunk.usage.prompt_tokens) == chunk.usage.prompt_tokens
        if choice.finish_reason:
            assert chunk.usage.completion_tokens == told[choice.index] == 30
    assert chunks[-1].usage.completion_tokens == sum(told.values())
    assert chunks[-1].usage.prompt_tokens == sum(count for index, count in prompts.items() if index % 2 == 0)
    await suite.rest()


async def test_several_prompts_and_choices_are_counted_through(suite, client):
    reply = await client.completions.create(model="story", prompt=["One", "Two"], n=2, max_tokens=30)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert {c.text for c in reply.choices} == {story(suite, 30)}
    assert reply.usage.prompt_tokens == 6
    by_ids = await client.completions.create(model="story", prompt=[[1, 2], [3]], max_tokens=5)
    assert [c.index for c in by_ids.choices] == [0, 1]
    await suite.rest()


async def test_completions_go_on_for_openais_16_tokens_where_nothing_is_said(suite, client):
    assert (await client.completions.create(model="story", prompt="x")).usage.completion_tokens == 16


async def test_stop_texts_end_a_choice_and_tell_which(suite, client):
    reply = await client.completions.create(model="story", prompt="x", max_tokens=200, stop=["7 8", "zz"])
    assert reply.choices[0].text == suite.story.partition("7 8")[0]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason == "7 8"
    shown = await client.completions.create(
        model="story", prompt="x", max_tokens=200, stop="7 8", extra_body={"include_stop_str_in_output": True}
    )
    assert shown.choices[0].text == suite.story.partition("7 8")[0] + "7 8"
    await suite.rest()


async def test_an_end_of_sequence_is_not_text_and_a_stop_token_is_named(suite, client):
    reply = await client.completions.create(model="story", prompt="x", max_tokens=2000, extra_body={"return_token_ids": True})
    assert reply.choices[0].text == suite.story
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason is None
    assert reply.choices[0].token_ids == [*suite.story.encode(), suite.eos]
    assert reply.choices[0].prompt_token_ids == [ord("x")]
    extra = {"stop_token_ids": [ord("5")]}
    reply = await client.completions.create(model="story", prompt="x", max_tokens=200, extra_body=extra)
    assert reply.choices[0].text == suite.story.partition("5")[0]
    assert reply.choices[0].stop_reason == ord("5")


async def test_chat_logprobs_have_bytes_and_alternatives(suite, client):
    ask = {"model": "story", "messages": [{"role": "user", "content": "x"}], "max_tokens": 4, "logprobs": True, "top_logprobs": 2}
    told = (await client.chat.completions.create(**ask)).choices[0].logprobs.content
    assert bytes(b for t in told for b in t.bytes) == suite.story.encode()[:4]
    assert [a.logprob for a in told[0].top_logprobs] == [-1.5, -2.0]
    chunks = [c async for c in await client.chat.completions.create(**ask, stream=True)]
    streamed = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == told
    await suite.rest()


@pytest.mark.parametrize("stream", [True, False])
async def test_what_a_chat_tells_of_its_prompt_stands_once_beside_the_choices(suite, stream):
    """As vLLM has it; a completion has it in the choice, whose prompt it is."""
    body = {"messages": [{"role": "user", "content": "x"}], "n": 2, "max_tokens": 2, "stream": stream}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/chat/completions", json=body | {"return_token_ids": True, "prompt_logprobs": 0})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line and "[DONE]" not in line]
    told = [json.loads(line) for line in lines]
    ids = list(b"<user>x")
    assert [one["prompt_token_ids"] for one in told if "prompt_token_ids" in one] == [ids]
    assert told[0]["prompt_token_ids"] == ids
    (scores,) = (one["prompt_logprobs"] for one in told if "prompt_logprobs" in one)
    assert len(scores) == len(ids)
    choices = [choice for one in told for choice in one["choices"]]
    assert not any({"prompt_token_ids", "prompt_logprobs"} & set(choice) for choice in choices)
    assert sum(len(choice.get("token_ids", ())) for choice in choices) == 4
    await suite.rest()


async def test_a_text_longer_than_the_context_is_counted(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/tokenize", json={"prompt": "x" * 5000})
        assert (reply.json()["count"], reply.json()["max_model_len"]) == (5000, 4096)
        back = await client.post("/detokenize", json={"tokens": reply.json()["tokens"]})
        assert back.json()["prompt"] == "x" * 5000
        many = await client.post("/tokenize", json={"prompt": "x" * ((1 << 20) + 1)})
        assert (many.status_code, many.json()["error"]["param"]) == (400, "prompt")


async def test_pages_of_named_origins_alone_may_ask(suite_with):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    async with suite_with(cors_origins=("https://chat.example",)) as suite, httpx.AsyncClient(base_url=suite.http) as client:
        before = await client.options("/v1/completions", headers={"Origin": "https://chat.example", **asked})
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in before.headers["access-control-allow-headers"]
        reply = await client.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": "https://chat.example"})
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        assert "X-Request-Id" in reply.headers["access-control-expose-headers"]
        other = await client.get("/v1/models", headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    async with suite_with() as suite, httpx.AsyncClient(base_url=suite.http) as client:
        assert (await client.options("/v1/completions", headers={"Origin": "https://chat.example", **asked})).status_code == 405


async def test_echo_with_logprobs_covers_the_prompt(suite, client):
    reply = await client.completions.create(model="story", prompt="Hey", max_tokens=3, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert choice.text == "Hey" + story(suite, 3)
    assert choice.logprobs.tokens[:3] == ["H", "e", "y"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -1.5, -1.5, -1.5]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 3, 3]  # three bytes of one character
    await suite.rest()


async def test_no_new_token_scores_a_prompt(suite, client):
    reply = await client.completions.create(model="story", prompt="Hey", max_tokens=0, echo=True, logprobs=1)
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason) == ("Hey", "length")
    assert choice.logprobs.tokens == ["H", "e", "y"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 0)
    chunks = [c async for c in await client.completions.create(model="story", prompt="Hey", max_tokens=0, echo=True, stream=True)]
    assert "".join(c.choices[0].text for c in chunks) == "Hey"
    assert chunks[-1].choices[0].finish_reason == "length"
    await suite.rest()


async def test_an_echoed_prompt_that_has_no_text_has_log_probabilities(suite, client):
    reply = await client.completions.create(model="story", prompt=[256, 257], max_tokens=2, echo=True, logprobs=0)
    choice = reply.choices[0]
    assert choice.text == story(suite, 2)
    assert choice.logprobs.token_logprobs == [None, -0.5, -1.5, -1.5]
    assert choice.logprobs.text_offset == [0, 0, 0, 0]
    await suite.rest()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_of_one_token_has_one_place_among_its_log_probabilities(suite, stream):
    body = {"model": "story", "prompt": [[104], [104, 105]], "max_tokens": 3, "prompt_logprobs": 0, "stream": stream}
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json=body)
    told = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")] if stream else [reply.json()]
    choices = [choice for one in told for choice in one["choices"] if "prompt_logprobs" in choice]
    scores = {choice["index"]: choice["prompt_logprobs"] for choice in choices}
    assert len(choices) == 2
    assert scores[0] == [None]
    assert scores[1][0] is None
    assert list(scores[1][1]) == ["105"]


async def test_errors_are_openais(suite, client):
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="story", messages=[{"role": "user", "content": "x"}], top_p=7)
    assert (refused.value.param, refused.value.type, refused.value.code) == ("top_p", "invalid_request_error", "invalid_value")
    parts = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        await client.chat.completions.create(model="story", messages=[{"role": "user", "content": parts}])
    assert refused.value.param == "messages[0].content[0]"


async def test_a_failure_behind_the_first_text_is_an_error_event(suite, client):
    stream = await client.completions.create(model="story", prompt="x", max_tokens=2000, stream=True)
    await anext(aiter(stream))
    for executor in suite.executors:
        executor.refuse = 100
    await suite.executors[0].kill()
    with pytest.raises(openai.APIError) as failure:
        async for _ in stream:
            pass
    assert failure.value.code == "unavailable"
    await suite.rest()


async def test_closing_a_stream_frees_the_request(suite, client):
    stream = await client.completions.create(model="story", prompt="x", max_tokens=4000, stream=True)
    await anext(aiter(stream))
    suite.executors[0].gate.clear()
    await stream.close()
    await suite.rest()


async def test_a_silent_stream_is_kept_alive_and_bears_the_clients_request_id(suite_with):
    async with suite_with(sse_keepalive_seconds=0.05) as suite:
        suite.executors[0].gate.clear()
        body = {"model": "story", "prompt": "x", "stream": True}
        async with (
            httpx.AsyncClient(base_url=suite.http) as client,
            client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as reply,
        ):
            assert reply.headers["x-request-id"] == "mine"
            lines = reply.aiter_lines()
            while (line := await anext(lines)) != ": keepalive":
                assert not line
            suite.executors[0].gate.set()
            rest = [line async for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert any("cmpl-mine" in line for line in rest)
        await suite.rest()


@pytest.mark.parametrize("page", ["completions", "chat/completions"])
async def test_a_stream_that_is_not_silent_holds_nothing_but_events(suite, page):
    body = {"model": "story", "stream": True, "max_tokens": 3, "prompt": "x", "messages": [{"role": "user", "content": "x"}]}
    body.pop("messages" if page == "completions" else "prompt")
    async with httpx.AsyncClient(base_url=suite.http) as client:
        lines = (await client.post(f"/v1/{page}", json=body)).text.splitlines()
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines if line)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/chat/completions", 404, "there is no page /chat/completions; did you mean /v1/chat/completions?"),
        ("GET", "/models", 404, "there is no page /models; did you mean /v1/models?"),
        ("POST", "/v1/completions/", 404, "there is no page /v1/completions/; did you mean /v1/completions?"),
        ("GET", "/health/", 404, "there is no page /health/; did you mean /health?"),
        ("POST", "/v1/completion", 404, "there is no page /v1/completion; did you mean /v1/completions?"),
        ("POST", "/v1/responses", 404, "there is no page /v1/responses; there are /v1/completions, /v1/chat/completions, "),
        ("POST", "/v1/embeddings", 404, "there is no page /v1/embeddings; there are /v1/completions, "),
        ("GET", "/", 404, "there is no page /; there are /v1/completions, /v1/chat/completions, /v1/models, /v1/models/{name}, "),
        ("GET", "/%ff%00%f0%9f%8d%8a", 404, "there is no page /"),
        ("POST", "/v1/models/" + 500 * "x", 405, f"/v1/models/{117 * 'x'} does not take POST; it takes"),
        ("GET", "/v1/completions", 405, "/v1/completions does not take GET; it takes POST"),
    ],
)
async def test_who_asks_for_no_page_is_told_which_there_are(suite, method, path, status, message):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.request(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]["message"].startswith(message)


async def test_tokenize_and_detokenize_are_each_others_inverse(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        told = (await client.post("/tokenize", json={"model": "story", "prompt": "Grüß"})).json()
        assert told == {"count": 6, "max_model_len": 4096, "tokens": list("Grüß".encode())}
        back = await client.post("/detokenize", json={"model": "story", "tokens": told["tokens"]})
        assert back.json() == {"prompt": "Grüß"}
        refused = await client.post("/detokenize", json={"model": "story", "tokens": [999]})
        assert refused.json()["error"]["param"] == "tokens"
        assert (await client.post("/tokenize", json={"tokens": []})).status_code == 400


async def test_metrics_count_what_ran(suite, client):
    await asyncio.gather(*(client.completions.create(model="story", prompt="x", max_tokens=10) for _ in range(3)))
    async with httpx.AsyncClient(base_url=suite.http) as http:
        text = (await http.get("/metrics")).text
    assert 'penstock_gateway_generation_tokens_total{model_name="story"} 30.0' in text
    assert 'penstock_request_success_total{finished_reason="length",model_name="story"} 3.0' in text
    assert 'penstock_time_to_first_token_seconds_count{model_name="story"} 3.0' in text
    assert "penstock_gateway_requests_running 0.0" in text
    assert "penstock_gateway_sequences 0.0" in text


async def test_small_writes_do_not_wait_for_acknowledgements(suite, monkeypatch):
    """Nagle's algorithm would hold back each small chunk until the client has acknowledged the one before: 40 ms."""
    found = []
    connection_made = BoundedConnection.connection_made

    def noted(connection, transport):
        found.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        connection_made(connection, transport)

    monkeypatch.setattr(BoundedConnection, "connection_made", noted)
    async with httpx.AsyncClient(base_url=suite.http) as client:
        await client.get("/health")
    assert found
    assert all(found)


@pytest.mark.parametrize(
    ("page", "body", "preceding"),
    [
        ("completions", {"prompt": "once upon a time there"}, "upon a time there"[-16:]),
        ("completions", {"prompt": [104, 105]}, "hi"),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, ""),
        ("chat/completions", {"messages": [{"role": "user", "content": "hi"}], "continue_final_message": True}, "<user>hi"),
    ],
)
async def test_an_answer_that_goes_on_with_a_text_is_decoded_behind_it(suite, page, body, preceding):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post(f"/v1/{page}", json={"model": "story", "max_tokens": 2, **body})
    assert reply.status_code == 200
    (opening,) = suite.tokenizer.openings
    assert bytes(opening.preceding_ids).decode() == preceding
