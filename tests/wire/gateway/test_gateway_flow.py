"""A request through both doors, with the other services played by small servicers."""

import time

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
    executor = listed.models[0].executors[0]
    assert executor.kv_blocks_free == 99
    assert (executor.calibration.prefill_tokens_per_second, executor.calibration.prefill_chunk) == (128, 96)
    assert [(speed.batch, speed.tokens_per_second) for speed in executor.calibration.decode] == [(1, 4), (8, 16)]


async def test_no_name_means_the_one_model_that_is_served(suite):
    found = await suite.models.GetModel(models_pb2.GetModelRequest())
    assert found.model.name == "story"


async def test_times_begin_when_a_request_arrives(suite):
    suite.tokenizer.encode_gate.clear()
    call = suite.inference.Generate(inference_pb2.GenerateRequest(prompt={"text": "x"}, stopping={"max_tokens": 4}))
    await suite.tokenizer.encoding.wait()
    begun = time.monotonic()
    await suite.eventually(lambda: time.monotonic() - begun > 0.05)
    suite.tokenizer.encode_gate.set()
    *_, last = [m async for m in call]
    assert last.closing.total_time.ToTimedelta().total_seconds() > 0.05
    async with httpx.AsyncClient(base_url=suite.http) as client:
        told = (await client.get("/metrics")).text
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        (line,) = [li for li in told.splitlines() if li.startswith(f"penstock_{name}_sum")]
        assert float(line.split()[-1]) > 0.05


async def test_what_is_colder_than_a_hundredth_is_taken_as_that(suite):
    for asked in (0, 1e-30, 0.5):
        await generate(suite, prompt=inference_pb2.Prompt(text="x"), sampling=inference_pb2.Sampling(temperature=asked))
    temperatures = [round(s.sampling.temperature, 6) for s in suite.executors[0].all_started]
    assert temperatures == [0, 0.01, 0.5]
