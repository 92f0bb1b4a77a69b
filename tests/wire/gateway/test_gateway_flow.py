"""A request through both doors, with the other services played by small servicers."""

import httpx

from penstock.v1 import inference_pb2, models_pb2


async def generate(suite, **fields):
    answers = [m async for m in suite.inference.Generate(inference_pb2.GenerateRequest(model="story", **fields))]
    return "".join(m.text for m in answers), answers


async def test_grpc_streams_the_text_and_closes_with_usage(suite):
    text, answers = await generate(
        suite,
        prompt=inference_pb2.Prompt(text="Tell me"),
        stopping=inference_pb2.Stopping(max_tokens=40),
        reporting=inference_pb2.Reporting(token_ids=True),
    )
    ids = [i for m in answers for i in m.token_ids]
    assert bytes(ids) == suite.story.encode()[:40]
    assert text == suite.story.encode()[:40].decode()
    closing = answers[-1].closing
    assert answers[-2].finish.reason == inference_pb2.FINISH_REASON_LENGTH
    assert (closing.usage.prompt_tokens, closing.usage.completion_tokens, closing.usage.cached_tokens) == (7, 40, 2)
    assert [p.executor_id for p in closing.placements] == ["executor-0"]
    assert closing.placements[0].backend == "fake"
    assert closing.model == "story"
    assert closing.replacements == 0
    await suite.rest()


async def test_http_answers_as_grpc_does(suite):
    text, _ = await generate(suite, prompt=inference_pb2.Prompt(text="Tell me"), stopping=inference_pb2.Stopping(max_tokens=40))
    async with httpx.AsyncClient(base_url=suite.http) as client:
        reply = await client.post("/v1/completions", json={"model": "story", "prompt": "Tell me", "max_tokens": 40})
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["text"] == text
    assert reply.json()["usage"]["completion_tokens"] == 40
    await suite.rest()


async def test_models_tell_what_is_served(suite):
    listed = await suite.models.ListModels(models_pb2.ListModelsRequest())
    assert [(m.name, m.context_length, len(m.executors)) for m in listed.models] == [("story", 4096, 2)]
    assert listed.models[0].executors[0].kv_blocks_free == 99
