"""The tokenizer service over real gRPC."""

import asyncio
import json
from types import SimpleNamespace

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from penstock.common import tracing
from penstock.common.channel import connect
from penstock.common.errors import InvalidRequest, UnknownModel, error_from_status
from penstock.common.service import StartError
from penstock.internal.v1 import tokenizer_pb2 as pb
from penstock.internal.v1 import tokenizer_pb2_grpc as pb_grpc
from penstock.tokenizer.config import TokenizerConfig
from penstock.tokenizer.server import TokenizerServer

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    "{% if style is defined %}{{ style }}{% endif %}"
)


def _checkpoint(folder, template=TEMPLATE):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|user|>", "<|assistant|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox", "한국어"], trainer)
    folder.mkdir()
    tokenizer.enable_truncation(4)  # a leftover of training, which must cut nothing here
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    tokenizer.no_truncation()
    return tokenizer


@pytest.fixture
async def service(tmp_path):
    tokenizer = _checkpoint(tmp_path / "a")
    _checkpoint(tmp_path / "bare", template=None)
    server = TokenizerServer(TokenizerConfig(models=(f"m={tmp_path / 'a'}", f"bare={tmp_path / 'bare'}"), listen="127.0.0.1:0"))
    try:
        told = await server.start()
        async with connect(told["grpc"]) as channel:
            yield SimpleNamespace(
                stub=pb_grpc.TokenizerServiceStub(channel),
                tokenizer=tokenizer,
                server=server,
                count=server._metrics.registry.get_sample_value,
                **told,
            )
    finally:
        await server.close()


async def _error(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_status(caught.value.code(), rpc_status.from_call(caught.value))


async def test_encodes_and_decodes_text(service):
    for text in ("the fox 한국어 👍🏽", "the quick brown fox " * 2000):
        answer = await service.stub.Encode(pb.EncodeRequest(model="m", text=text))
        assert list(answer.token_ids) == service.tokenizer.encode(text).ids
        back = await service.stub.Detokenize(pb.DetokenizeRequest(model="m", token_ids=answer.token_ids, tokens=True))
        assert back.text == text
        assert b"".join(back.tokens) == text.encode()
        assert back.fingerprint == answer.fingerprint


async def test_encodes_a_conversation_by_the_chat_template(service):
    chat = pb.EncodeRequest.Chat(messages=[pb.ChatMessage(role="user", content="the fox")], add_generation_prompt=True)
    answer = await service.stub.Encode(pb.EncodeRequest(model="m", chat=chat))
    assert list(answer.token_ids) == service.tokenizer.encode("<|user|>the fox<|assistant|>").ids
    assert answer.token_ids[0] == service.tokenizer.token_to_id("<|user|>")


async def test_encodes_a_conversation_that_ends_within_its_last_message(service):
    turns = [pb.ChatMessage(role="user", content="the fox"), pb.ChatMessage(role="assistant", content="quick")]
    chat = pb.EncodeRequest.Chat(messages=turns, continue_final_message=True)
    answer = await service.stub.Encode(pb.EncodeRequest(model="m", chat=chat))
    assert list(answer.token_ids) == service.tokenizer.encode("<|user|>the fox<|assistant|>quick").ids


@pytest.mark.parametrize(("style", "text"), [("brief", "brief"), (5, "5"), (0.5, "0.5"), (False, "False"), (None, "None")])
async def test_a_chat_template_reads_what_is_given_beside_the_conversation(service, style, text):
    chat = pb.EncodeRequest.Chat(messages=[pb.ChatMessage(role="user", content="fox")], chat_template_kwargs={"style": style})
    answer = await service.stub.Encode(pb.EncodeRequest(model="m", chat=chat))
    assert list(answer.token_ids) == service.tokenizer.encode(f"<|user|>fox{text}").ids


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.EncodeRequest(model="m", text="the quick brown fox", max_tokens=1), "prompt"),
        (
            pb.EncodeRequest(
                model="m", chat=pb.EncodeRequest.Chat(messages=[pb.ChatMessage(role="user", content="fox")]), max_tokens=1
            ),
            "messages",
        ),
        (pb.EncodeRequest(model="m", chat=pb.EncodeRequest.Chat()), "messages"),
        (
            pb.EncodeRequest(
                model="m",
                chat=pb.EncodeRequest.Chat(messages=[pb.ChatMessage(role="user")], chat_template_kwargs={"styl": 1}),
            ),
            "chat_template_kwargs",
        ),
        (pb.EncodeRequest(model="bare", chat=pb.EncodeRequest.Chat(messages=[pb.ChatMessage(role="user")])), "messages"),
        (pb.EncodeRequest(model="m", text="the quick brown fox " * 200_000, max_tokens=100), "prompt"),
        (pb.EncodeRequest(model="m"), "input"),
    ],
)
async def test_refuses_what_it_can_not_encode_by_the_fields_name(service, request_, field):
    error = await _error(service.stub.Encode(request_))
    assert isinstance(error, InvalidRequest)
    assert [v.field for v in error.violations] == [field]


async def test_refuses_unknown_models_and_ids(service):
    assert isinstance(await _error(service.stub.Encode(pb.EncodeRequest(model="other", text="x"))), UnknownModel)
    error = await _error(service.stub.Detokenize(pb.DetokenizeRequest(model="m", token_ids=[4_000_000_000])))
    assert [v.field for v in error.violations] == ["token_ids"]


async def test_the_fingerprint_covers_the_template(service):
    told = [(await service.stub.Encode(pb.EncodeRequest(model=name, text="x"))).fingerprint for name in ("m", "bare")]
    assert all(told)
    assert len(set(told)) == 2


async def test_streams_many_decodings_at_once(service):
    texts = {n: f"the fox {n} 한국어 👍🏽" * n for n in range(1, 20)}
    ids = {n: service.tokenizer.encode(text).ids for n, text in texts.items()}
    stream = service.stub.Decode()
    await stream.write(pb.DecodeRequest(open=[pb.OpenDecoding(decoding_id=n, model="m") for n in texts]))
    for position in range(max(map(len, ids.values()))):
        running = [n for n in ids if position < len(ids[n])]
        ended = [n for n in running if position == len(ids[n]) - 1]
        await stream.write(pb.DecodeRequest(decoding_ids=running, token_ids=[ids[n][position] for n in running], finished=ended))
    await stream.done_writing()
    told = dict.fromkeys(texts, "")
    last = set()
    async for answer in stream:
        for one in answer.texts:
            assert one.byte_offset == len(told[one.decoding_id].encode())
            told[one.decoding_id] += one.text
            if one.last:
                assert one.tokens == len(ids[one.decoding_id])
                last.add(one.decoding_id)
    assert told == texts
    assert last == set(texts)
    assert service.count("penstock_tokenizer_decoded_tokens_total") == sum(map(len, ids.values()))


async def test_stops_at_a_stop_text_and_ignores_what_is_already_on_its_way(service):
    ids = service.tokenizer.encode("the fox. the fox").ids
    stream = service.stub.Decode()
    opening = pb.OpenDecoding(decoding_id=5, model="m", stop=["quick", "ox. t"])
    await stream.write(pb.DecodeRequest(open=[opening], decoding_ids=[5] * len(ids), token_ids=ids))
    (told,) = (await stream.read()).texts
    assert (told.text, told.stop_index, told.last) == ("the f", 1, True)
    await stream.write(pb.DecodeRequest(decoding_ids=[5, 77], token_ids=[1, 1], finished=[5], closed=[5, 78]))
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF


async def test_replays_a_decoding_that_a_lost_stream_had(service):
    ids = service.tokenizer.encode("the quick 한").ids
    first = service.stub.Decode()
    await first.write(pb.DecodeRequest(open=[pb.OpenDecoding(decoding_id=1, model="m")], decoding_ids=[1] * 3, token_ids=ids[:3]))
    await first.read()
    first.cancel()
    again = service.stub.Decode()
    await again.write(pb.DecodeRequest(open=[pb.OpenDecoding(decoding_id=9, model="m", replayed_ids=ids[:-1])]))
    (replayed,) = (await again.read()).texts
    assert (replayed.byte_offset, replayed.tokens, replayed.last) == (0, len(ids) - 1, False)
    await again.write(pb.DecodeRequest(decoding_ids=[9], token_ids=ids[-1:], finished=[9]))
    (end,) = (await again.read()).texts
    assert replayed.text + end.text == "the quick 한"
    assert end.last
    await again.done_writing()


async def test_describes_ids(service):
    ids = service.tokenizer.encode("한").ids
    stream = service.stub.Decode()
    await stream.write(
        pb.DecodeRequest(
            open=[pb.OpenDecoding(decoding_id=1, model="m")], describe=[pb.DescribeTokens(decoding_id=1, token_ids=[*ids, 10**9])]
        )
    )
    (described,) = (await stream.read()).described
    assert b"".join(described.tokens) == "한".encode()
    assert len(described.tokens) == len(ids) + 1
    await stream.done_writing()


async def test_a_decoding_of_an_unknown_model_ends_at_once_and_the_others_go_on(service):
    stream = service.stub.Decode()
    opened = [pb.OpenDecoding(decoding_id=1, model="other"), pb.OpenDecoding(decoding_id=2, model="m")]
    await stream.write(pb.DecodeRequest(open=opened, decoding_ids=[1, 2], token_ids=service.tokenizer.encode("the").ids * 2))
    told = {one.decoding_id: one for one in (await stream.read()).texts}
    assert (told[1].last, told[1].text) == (True, "")
    assert (told[2].last, told[2].text) == (False, "the")
    await stream.done_writing()


async def test_a_stream_that_ends_frees_what_it_opened(service):
    stream = service.stub.Decode()
    await stream.write(
        pb.DecodeRequest(open=[pb.OpenDecoding(decoding_id=n, model="m") for n in range(50)], decoding_ids=[3], token_ids=[80])
    )
    await stream.read()
    assert service.count("penstock_tokenizer_decodings") == 50
    stream.cancel()
    async with asyncio.timeout(5):
        while service.count("penstock_tokenizer_decode_streams"):  # noqa: ASYNC110 - the end of a stream is told to nobody
            await asyncio.sleep(0)
    assert service.count("penstock_tokenizer_decodings") == 0


async def test_a_drain_ends_decoding_streams_and_waits_for_nobody_that_watches(service):
    ids = service.tokenizer.encode("the quick").ids
    async with connect(service.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        stream = service.stub.Decode()
        await stream.write(pb.DecodeRequest(open=[pb.OpenDecoding(decoding_id=1, model="m")], decoding_ids=[1], token_ids=ids[:1]))
        await stream.read()
        async with asyncio.timeout(10):
            await service.server.drain()
        assert await stream.read() is grpc.aio.EOF
        assert await stream.code() is grpc.StatusCode.OK
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert service.count("penstock_tokenizer_decodings") == 0


async def test_a_drain_lets_a_running_call_end(service):
    long = "the quick brown fox " * 200_000
    encoding = asyncio.ensure_future(service.stub.Encode(pb.EncodeRequest(model="m", text=long)))
    async with asyncio.timeout(30):
        while not service.server._servicer._calls:  # noqa: ASYNC110 - a call begins without telling anybody
            await asyncio.sleep(0)
        await service.server.drain()
    assert len((await encoding).token_ids) == 1_000_000


async def test_columns_of_different_length_end_the_stream_with_a_typed_error(service):
    stream = service.stub.Decode()
    await stream.write(pb.DecodeRequest(decoding_ids=[1, 2], token_ids=[3]))
    error = await _error(stream.read())
    assert [v.field for v in error.violations] == ["token_ids"]


@pytest.mark.parametrize(
    ("models_", "reason"),
    [
        ((), "none given"),
        (("m",), "is not NAME=FOLDER"),
        (("m={empty}",), "holds no tokenizer.json"),
        (("m={broken}",), "is no tokenizer"),
        (("m={template}",), "the chat template is wrong"),
    ],
)
async def test_says_in_one_line_why_it_can_not_start(tmp_path, models_, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    _checkpoint(tmp_path / "template", template="{% for %}")
    folders = {name: tmp_path / name for name in ("empty", "broken", "template")}
    server = TokenizerServer(TokenizerConfig(models=tuple(m.format(**folders) for m in models_), listen="127.0.0.1:0"))
    with pytest.raises(StartError, match=reason) as caught:
        await server.start()
    assert "\n" not in str(caught.value)
    await server.close()


async def test_its_span_belongs_to_the_callers(service):
    exporter = InMemorySpanExporter()
    assert tracing.configure("penstock-tokenizer", exporter=exporter)
    try:
        with tracing.span("encode") as above:
            await service.stub.Encode(pb.EncodeRequest(model="m", text="the fox"), metadata=tracing.metadata())
            trace = above.traceparent.split("-")[1]
    finally:
        tracing.shutdown()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert f"{spans['tokenize'].context.trace_id:032x}" == trace
    assert spans["tokenize"].parent.span_id == spans["encode"].context.span_id


async def test_serves_health_and_metrics(tmp_path):
    _checkpoint(tmp_path / "a", template=None)
    server = TokenizerServer(TokenizerConfig(models=(f"m={tmp_path / 'a'}",), listen="127.0.0.1:0", metrics="127.0.0.1:0"))
    try:
        told = await server.start()
        async with connect(told["grpc"]) as channel, httpx.AsyncClient() as http:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service="penstock.internal.v1.TokenizerService"))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await pb_grpc.TokenizerServiceStub(channel).Encode(pb.EncodeRequest(text="the"))
            assert "penstock_tokenizer_encoded_tokens_total 1.0" in (await http.get(f"http://{told['metrics']}/metrics")).text
    finally:
        await server.close()
