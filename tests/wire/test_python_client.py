"""The Python client, async and sync, against a server that does what each test asks of it."""

import asyncio
import contextlib

import grpc
import grpc.aio
import pytest
from fake_server import CLOSING, FakeServer
from google.protobuf import duration_pb2
from tls import OPENSSL, certificate

from penstock.cli.connection import Connection
from penstock.cli.models import models
from penstock.client import (
    AsyncClient,
    Calibration,
    Cancelled,
    Client,
    ClientClosed,
    DeadlineExceeded,
    FieldViolation,
    FinishReason,
    InvalidRequest,
    Message,
    Overloaded,
    PenstockError,
    StreamConsumed,
    Unauthenticated,
    Unavailable,
    UnknownModel,
)
from penstock.common import errors
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import models_pb2_grpc


class Awaited:
    """An async client behind blocking calls, so that one test serves both."""

    def __init__(self, runner, target, **options):
        self.run = runner.run
        self.client = AsyncClient(target, **options)

    def generate(self, *args, **options):
        return AwaitedStream(self, self.client.generate, args, options)

    def chat(self, *args, **options):
        return AwaitedStream(self, self.client.chat, args, options)

    def __getattr__(self, name):
        return lambda *args, **options: self.run(getattr(self.client, name)(*args, **options))


class AwaitedStream:
    def __init__(self, client, method, args, options):
        async def begin():
            return method(*args, **options)

        self.run = client.run
        self.stream = client.run(begin())

    @property
    def closing(self):
        return self.stream.closing

    def __iter__(self):
        events = aiter(self.stream)
        while True:
            try:
                yield self.run(anext(events))
            except StopAsyncIteration:
                return

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.run(self.stream.__aexit__(*error))

    def __getattr__(self, name):
        async def call(*args):
            answer = getattr(self.stream, name)(*args)
            return await answer if asyncio.iscoroutine(answer) else answer

        return lambda *args: self.run(call(*args))


@pytest.fixture(params=["sync", "async"])
def connect(request, fake):
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:

        def client(target=fake.address, **options):
            made = Client(target, **options) if request.param == "sync" else Awaited(runner, target, **options)
            stack.callback(made.close)
            return made

        yield client


def test_streams_events_and_tells_the_closing(fake, connect):
    logprob = {
        "token_id": 8,
        "logprob": -0.5,
        "token": b"\xed",
        "rank": 1,
        "alternatives": [{"token_id": 9, "logprob": -1.0, "token": b"x"}],
    }
    fake.script = [
        {"text": "one ", "token_ids": [7]},
        {
            "text": "two",
            "token_ids": [8],
            "logprobs": [logprob],
            "finish": {"reason": pb.FINISH_REASON_STOP_SEQUENCE, "stop_text": "."},
        },
        CLOSING,
    ]
    with connect().generate("hello", max_tokens=2) as stream:
        first, second = list(stream)
    assert (first.text, first.token_ids, first.finish) == ("one ", (7,), None)
    assert (second.finish.reason, second.finish.stop_text, second.finish.stop_token_id) == (FinishReason.STOP_SEQUENCE, ".", None)
    assert (second.logprobs[0].token, second.logprobs[0].alternatives[0].token_id) == (b"\xed", 9)
    assert stream.closing.usage.cached_tokens == 1
    assert stream.closing.placements[0].backend == "fake"
    assert (stream.closing.queue_seconds, stream.closing.seed) == (0.005, 2**63)


def test_a_closing_tells_of_a_handoff_and_takes_what_a_newer_server_says(fake, connect):
    told = pb.Closing(
        prefill_executor_id="p",
        decode_executor_id="d",
        placement_reason=pb.PLACEMENT_REASON_COST,
        handoff=pb.Handoff(kv_bytes=2**40, transfer_time=duration_pb2.Duration(nanos=7_000_000), transport="nixl", native=True),
        fallback=pb.FALLBACK_REPLACED,
        fallback_reason="decode_lost",
        first_step_time=duration_pb2.Duration(nanos=3_000_000),
        encode_time=duration_pb2.Duration(nanos=1_000_000),
        first_token_time=duration_pb2.Duration(nanos=5_000_000),
        first_text_time=duration_pb2.Duration(seconds=1),
    )
    newer = pb.Closing.FromString(pb.Closing(placement_reason=99, fallback=99).SerializeToString())
    fake.script = [told]
    closing = connect().generate("hello").result().closing
    assert (closing.prefill_executor_id, closing.decode_executor_id) == ("p", "d")
    assert (closing.placement_reason, closing.fallback, closing.fallback_reason) == ("cost", "replaced", "decode_lost")
    assert (closing.handoff.kv_bytes, closing.handoff.transfer_seconds, closing.handoff.exposed_seconds) == (2**40, 0.007, 0.0)
    assert (closing.handoff.transport, closing.handoff.native, closing.first_step_seconds) == ("nixl", True, 0.003)
    assert (closing.encode_seconds, closing.first_token_seconds, closing.first_text_seconds) == (0.001, 0.005, 1.0)
    fake.script = [newer]
    closing = connect().generate("hello").result().closing
    assert (closing.placement_reason, closing.fallback, closing.handoff) == ("unspecified", "unspecified", None)


def test_collects_interleaved_choices(fake, connect):
    length = {"reason": pb.FINISH_REASON_LENGTH}
    fake.script = [
        {"text": "a", "index": 0},
        {"text": "x", "index": 1},
        {"text": "b", "index": 0, "finish": length},
        {"text": "y", "index": 1, "finish": length},
        CLOSING,
    ]
    result = connect().chat([Message("user", "hi")], n=2).result()
    assert [choice.text for choice in result.choices] == ["ab", "xy"]
    assert {choice.finish.reason for choice in result.choices} == {FinishReason.LENGTH}
    assert (result.text, result.usage.prompt_tokens) == ("ab", 3)


def test_sends_every_option_in_its_field(fake, connect):
    fake.script = [CLOSING]
    client = connect(api_key="secret", timeout=60)
    client.generate(
        [1, 2],
        model="m",
        temperature=0.0,
        top_k=5,
        logit_bias={7: -1.5},
        stop="\n",
        max_tokens=3,
        logprobs=0,
        n=2,
        priority=-3,
        request_id="mine",
        timeout=20,
    ).result()
    client.chat([{"role": "user", "content": "hi", "name": "Ada"}], stop=["a", "b"], add_generation_prompt=False).result()
    client.chat([{"role": "assistant", "content": "It is"}], continue_final_message=True).result()
    client.chat([{"role": "user", "content": "hi"}], chat_template_kwargs={"enable_thinking": False, "budget": 5}).result()
    generate, chat, going_on, with_kwargs = fake.calls
    assert list(generate.request.prompt.token_ids.ids) == [1, 2]
    assert generate.request.sampling.HasField("temperature")
    assert not generate.request.sampling.HasField("top_p")
    assert dict(generate.request.sampling.logit_bias) == {7: -1.5}
    assert list(generate.request.stopping.stop) == ["\n"]
    assert generate.request.reporting.HasField("logprobs")
    assert (generate.request.model, generate.request.n, generate.request.priority) == ("m", 2, -3)
    assert (generate.metadata["authorization"], generate.metadata["x-request-id"]) == ("Bearer secret", "mine")
    assert 10 < generate.left < 21
    assert 30 < chat.left < 61
    assert chat.request.conversation.messages[0] == pb.Message(role="user", content="hi", name="Ada")
    assert not chat.request.conversation.add_generation_prompt
    assert not chat.request.conversation.continue_final_message
    assert going_on.request.conversation.continue_final_message
    assert not going_on.request.conversation.HasField("add_generation_prompt")
    assert list(chat.request.stopping.stop) == ["a", "b"]
    assert not chat.request.conversation.HasField("chat_template_kwargs")
    assert dict(with_kwargs.request.conversation.chat_template_kwargs) == {"enable_thinking": False, "budget": 5}


def test_refuses_a_misspelt_option_before_anything_is_sent(fake, connect):
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        connect().generate("x", temprature=1)
    assert fake.calls == []


@pytest.mark.parametrize(
    ("ask", "field", "right"),
    [
        (lambda c: c.generate("x", max_tokens=-1), "stopping.max_tokens", "from 0 to 4294967295, and is -1"),
        (lambda c: c.generate("x", seed=2**64), "sampling.seed", "from 0 to 18446744073709551615"),
        (lambda c: c.generate("x", temperature="hot"), "sampling.temperature", "a number, and is 'hot'"),
        (lambda c: c.generate("x", logit_bias={-1: 1.0}), "sampling.logit_bias", "a mapping from a whole number"),
        (lambda c: c.generate("x", stop_token_ids=[1.5]), "stopping.stop_token_ids", "a sequence, of which each is a whole number"),
        (lambda c: c.generate("x", n=-1), "n", "a whole number from 0"),
        (lambda c: c.generate("x", model=3), "model", "text"),
        (lambda c: c.generate([1] * 99 + [-1]), "prompt", "each is a whole number from 0 to 4294967295.* of 100"),
        (lambda c: c.generate("\ud800"), "prompt", "text that UTF-8 can hold"),
        (lambda c: c.chat([{"role": "user", "content": 3}]), "conversation.messages[0].content", "text"),
        (lambda c: c.chat([{"role": "user", "text": "x"}]), "conversation.messages[0]", "with role, content"),
        (lambda c: c.chat([{"role": "user", "content": None}]), "conversation.messages[0].content", "text, and is None"),
        (
            lambda c: c.chat([], chat_template_kwargs={"a": object()}),
            "conversation.chat_template_kwargs",
            "a mapping from names to texts, numbers",
        ),
        (lambda c: c.count_tokens([Message("tool", None)]), "conversation.messages[0].content", "text, and is None"),
        (lambda c: c.generate(b"Count"), "prompt", "a text or a sequence of token ids, and is bytes: decode it"),
        (lambda c: c.generate(memoryview(b"Count")), "prompt", "and is memoryview"),
        (lambda c: c.count_tokens("x", chat_template_kwargs={}), "chat_template_kwargs", "is for a conversation"),
        (lambda c: c.count_tokens(b"hello"), "prompt", "and is bytes"),
        (lambda c: c.count_tokens(bytearray(b"hello")), "prompt", "and is bytearray"),
        (lambda c: c.count_tokens([-1]), "prompt", "from 0 to 4294967295"),
        (lambda c: c.count_tokens(["x"]), "prompt", "a sequence of messages"),
        (lambda c: c.generate("x", request_id="a\nb"), "request_id", "must be printable ASCII"),
        (lambda c: c.chat([], request_id="r\u00e9"), "request_id", "must be printable ASCII"),
    ],
)
def test_a_value_that_no_field_can_hold_is_refused_before_anything_is_sent(fake, connect, ask, field, right):
    with pytest.raises(InvalidRequest, match=right) as refused:
        ask(connect())
    assert [violation.field for violation in refused.value.violations] == [field]
    assert "\n" not in str(refused.value)
    assert fake.calls == []


def test_an_assistants_message_may_have_no_text(fake, connect):
    fake.script = [CLOSING]
    connect().chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]).result()
    assert [m.content for m in fake.calls[0].request.conversation.messages] == ["hi", ""]


@pytest.mark.parametrize("ask", [lambda c: c.generate("x"), lambda c: c.models(), lambda c: c.count_tokens("x")])
@pytest.mark.parametrize("key", ["\u043a\u043b\u044e\u0447", "a\nb", "a\x7f"])
def test_a_key_that_can_not_be_sent_is_refused_and_not_told(fake, connect, ask, key):
    with pytest.raises(InvalidRequest, match=r"^api_key: must be printable ASCII") as refused:
        ask(connect(api_key=key))
    assert key not in str(refused.value)
    assert fake.calls == []


def test_a_stream_is_read_once(fake, connect):
    fake.script = [{"text": "a"}, {"text": "b"}, CLOSING]
    stream = connect().generate("x")
    assert stream.text() == "ab"
    for read_again in (stream.text, stream.result, lambda: list(stream)):
        with pytest.raises(StreamConsumed, match="read once"):
            read_again()
    assert len(fake.calls) == 1


ASKS = [
    lambda c: c.generate("x").text(),
    lambda c: c.chat([Message("user", "x")]).text(),
    lambda c: c.count_tokens("x"),
    lambda c: c.models(),
    lambda c: c.model("m"),
]


@pytest.mark.parametrize("ask", ASKS)
@pytest.mark.parametrize("used", [False, True])
def test_a_closed_client_says_that_it_is_closed(fake, connect, ask, used):
    client = connect()
    if used:
        client.models()
    client.close()
    with pytest.raises(ClientClosed, match="make a new one"):
        ask(client)
    assert fake.calls == []


def test_a_stream_that_was_not_begun_says_that_its_client_is_closed(fake, connect):
    client = connect()
    stream = client.generate("x")
    client.close()
    with pytest.raises(ClientClosed):
        stream.result()
    assert fake.calls == []


def test_closing_a_client_cancels_what_runs(fake):
    fake.script = [{"text": "one"}, None]

    async def closed_under(call, client):
        task = asyncio.create_task(call)
        await asyncio.to_thread(fake.begun.wait, 10)
        await client.close()
        with pytest.raises(Cancelled):
            await task

    async def main():
        async with AsyncClient(fake.address) as client:
            await closed_under(client.generate("x").result(), client)
        fake.begun.clear()
        async with AsyncClient(fake.address) as client:
            await closed_under(client.count_tokens("x"), client)

    asyncio.run(main())
    with Client(fake.address) as client:
        events = iter(client.generate("x"))
        next(events)
        client.close()
        with pytest.raises(Cancelled):
            next(events)


def test_counts_tokens_and_tells_models(fake, connect):
    client = connect()
    assert client.count_tokens("text", token_ids=True).token_ids == (5, 6)
    assert client.count_tokens([1, 2]).context_length == 128
    assert client.count_tokens([Message("user", "hi")]).count == 2
    assert [call.request.WhichOneof("input") for call in fake.calls] == ["prompt", "prompt", "conversation"]
    (model,) = client.models()
    assert (model.name, model.executors[0].kv_blocks, model.created.timestamp()) == ("m", 9, 60)
    assert client.model("m").name == "m"
    first, second = model.executors
    assert first.calibration == Calibration(2500, {1: 1000.5, 2: 2001, 4: 4002}, 64)
    assert second.calibration is None


def test_models_are_listed_with_their_executors_speeds(fake, capsys):
    assert models(executors=True, connection=Connection(target=fake.address)) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "2,500" in first
    assert "prefill" in first
    assert "1:1,000.5 4:4,002.0" in first
    assert "e2" in second


def test_a_stream_that_another_thread_closes_while_its_call_begins_ends(fake):
    fake.script = [None]
    with Client(fake.address) as client:
        stream = client.generate("x", timeout=60)
        start = stream._start

        def closed_meanwhile(left):
            call = start(left)
            stream.close()
            return call

        stream._start = closed_meanwhile
        assert list(stream) == []


@pytest.mark.parametrize("leave", ["break", "with", "close", "garbage"])
def test_leaving_a_stream_cancels_it_on_the_server(fake, connect, leave):
    fake.script = [{"text": "one"}, None]
    stream = connect().generate("x")
    if leave == "break":
        for _ in stream:
            break
    elif leave == "with":
        with stream:
            next(iter(stream))
    elif leave == "close":
        events = iter(stream)
        next(events)
        stream.close()
        assert list(events) == []
    else:
        next(iter(stream))
        del stream
    assert fake.cancelled.wait(10)


def test_a_cancelled_task_cancels_its_request(fake):
    fake.script = [{"text": "one"}, None]

    async def main():
        async with AsyncClient(fake.address) as client:
            stream = client.generate("x")
            events = aiter(stream)
            await anext(events)
            task = asyncio.create_task(anext(events))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert fake.cancelled.wait(10)


def test_the_deadline_ends_a_call_on_both_sides(fake, connect):
    fake.script = [{"text": "one"}, None]
    with pytest.raises(DeadlineExceeded):
        connect().generate("x", timeout=0.2).result()
    assert fake.cancelled.wait(10)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (
            errors.InvalidRequest(errors.FieldViolation("sampling.top_p", "in (0, 1]"), errors.FieldViolation("n", "at most 8")),
            InvalidRequest,
        ),
        (errors.UnknownModel("no model 'x'"), UnknownModel),
        (errors.Unauthenticated("send a key"), Unauthenticated),
        (ZeroDivisionError("secret"), errors.InternalError),
    ],
)
def test_raises_what_the_server_raised(fake, connect, raised, kind):
    fake.script = [raised]
    for call in (lambda c: c.generate("x").result(), lambda c: c.count_tokens("x")):
        with pytest.raises(PenstockError) as caught:
            call(connect())
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)
        if kind is InvalidRequest:
            assert caught.value.violations == (FieldViolation("sampling.top_p", "in (0, 1]"), FieldViolation("n", "at most 8"))
    assert len(fake.calls) == 2


def test_an_error_tells_the_request_id(fake, connect):
    fake.script = [{"text": "one"}, ZeroDivisionError("secret")]
    with pytest.raises(errors.InternalError) as caught:
        connect().generate("x", request_id="mine").result()
    assert caught.value.request_id == "mine"
    fake.script = [errors.Unavailable("later")]
    with pytest.raises(Unavailable) as caught:
        connect(retries=1).count_tokens("x")
    assert len(caught.value.request_id) == 32, "the server drew one"


def test_an_error_that_no_server_told_has_no_request_id(fake, connect):
    with pytest.raises(Unavailable) as away:
        connect("127.0.0.1:1", retries=0).models()
    fake.script = [None]
    with pytest.raises(DeadlineExceeded) as late:
        connect().generate("x", timeout=0.2).result()
    with pytest.raises(InvalidRequest) as wrong:
        connect().generate("x", n=-1)
    assert (away.value.request_id, late.value.request_id, wrong.value.request_id) == ("", "", "")


@pytest.mark.parametrize("refusal", [errors.Unavailable("later"), errors.Overloaded("full", 0.01)])
def test_tries_again_before_the_first_message(fake, connect, refusal):
    good = [{"text": "done"}, CLOSING]
    fake.script = [[refusal], [refusal], good, [refusal], []]
    client = connect()
    assert client.generate("x").text() == "done"
    assert client.count_tokens("x").count == 2
    assert len(fake.calls) == 5


@pytest.mark.parametrize(
    ("refusal", "kind"), [(errors.Unavailable("later"), Unavailable), (errors.Overloaded("full", 0.01), Overloaded)]
)
def test_never_tries_again_after_the_first_message(fake, connect, refusal, kind):
    fake.script = [[{"text": "one"}, refusal], [{"text": "again"}, CLOSING]]
    told = []
    with pytest.raises(kind):
        told.extend(event.text for event in connect().generate("x"))
    assert len(fake.calls) == 1


@pytest.mark.parametrize("refusal", [errors.Unavailable("later"), errors.Overloaded("full", 0.01)])
def test_gives_up_after_the_retries_it_was_given(fake, connect, refusal):
    fake.script = [refusal]
    for retries in (0, 2):
        fake.calls.clear()
        with pytest.raises((Unavailable, Overloaded)):
            connect(retries=retries).generate("x").result()
        assert len(fake.calls) == retries + 1


def test_does_not_wait_beyond_its_deadline_to_try_again(fake, connect):
    fake.script = [errors.Overloaded("full", 60)]
    with pytest.raises(Overloaded) as caught:
        connect().generate("x", timeout=30).result()
    assert caught.value.retry_after == 60
    assert len(fake.calls) == 1


def test_says_that_nobody_answers(connect):
    with pytest.raises(Unavailable):
        connect("127.0.0.1:1", retries=0).models()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize("target", ["http://127.0.0.1:8000", "https://host", "grpc://127.0.0.1:8001", "127.0.0.1:99999", "8001"])
def test_what_is_no_address_is_refused_when_a_client_is_made(kind, target):
    with pytest.raises(ValueError, match=f"^target: must be HOST:PORT of a gRPC door, .*, and is {target!r}$"):
        kind(target)


@pytest.mark.parametrize("scheme", ["dns:///", "dns:", "ipv4:", ""])
def test_a_target_may_have_a_scheme_of_grpc(fake, connect, scheme):
    assert connect(f"{scheme}{fake.address}").model("m").name == "m"


def test_a_target_may_be_a_socket(connect, tmp_path):
    with pytest.raises(Unavailable, match="No such file"):
        connect(f"unix:{tmp_path}/nobody", retries=0).models()


def test_takes_messages_larger_than_grpcs_own_limit(fake, connect):
    fake.script = [{"text": "x" * (5 << 20)}, CLOSING]
    assert len(connect().generate("x").text()) == 5 << 20


@pytest.mark.skipif(OPENSSL is None, reason="makes its certificate with openssl")
async def test_speaks_tls_with_roots_of_ones_own(tmp_path):
    key, signed = certificate(tmp_path)
    server = grpc.aio.server()
    models_pb2_grpc.add_ModelsServicer_to_server(FakeServer(), server)
    secret = grpc.ssl_server_credentials([(key.read_bytes(), signed.read_bytes())])
    port = server.add_secure_port("localhost:0", secret)
    await server.start()
    try:
        async with AsyncClient(f"localhost:{port}", tls=signed.read_bytes()) as client:
            assert (await client.model("m")).name == "m"
        async with AsyncClient(f"localhost:{port}", tls=True, retries=0) as client:
            with pytest.raises(Unavailable):
                await client.model("m", timeout=10)
    finally:
        await server.stop(0)
