"""Small servicers that stand for the other services, over real gRPC, with switches for what can go wrong."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from types import SimpleNamespace

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from penstock.common.errors import ContextOverflow, InvalidRequest
from penstock.common.server import GrpcServer
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import GatewayServer
from penstock.internal.v1 import (
    executor_pb2,
    executor_pb2_grpc,
    handoff_pb2,
    scheduler_pb2,
    scheduler_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from penstock.v1 import inference_pb2_grpc, models_pb2_grpc

EOS = 257
FIELDS = [
    *(f"sampling.{f}" for f in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")),
    *("sampling.repetition_penalty", "sampling.logit_bias", "sampling.seed"),
    *(f"stopping.{f}" for f in ("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos")),
    *("reporting.logprobs", "reporting.prompt_logprobs"),
]
# What every fake executor says: token ids are bytes.
STORY = ("일 하나, 둘 😀 " + " ".join(str(i) for i in range(200))).encode()


class Served:
    """A gRPC server that can be stopped hard and started again on the same port."""

    service_name = ""
    register = None

    def __init__(self):
        self.address = "127.0.0.1:0"
        self.server = None

    async def start(self):
        self.server = GrpcServer()
        self.server.add(type(self).register, self, self.service_name)
        self.address = self.server.listen(self.address)
        await self.server.start()
        await self.server.set_serving(serving=True)
        return self

    async def kill(self):
        server, self.server = self.server, None
        if server is not None:
            await server.stop(0)


class FakeTokenizer(Served, tokenizer_pb2_grpc.TokenizerServiceServicer):
    """A byte is an id. Text is told as soon as it is whole characters, and held back where a stop text may begin."""

    service_name = "penstock.internal.v1.TokenizerService"
    register = staticmethod(tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server)

    def __init__(self):
        super().__init__()
        self.encode_gate = asyncio.Event()
        self.encode_gate.set()
        self.encoding = asyncio.Event()
        self.open = {}
        self.openings = []

    async def Encode(self, request, context):
        self.encoding.set()
        await self.encode_gate.wait()
        text = request.text or "".join(f"<{m.role}>{m.content}" for m in request.chat.messages)
        text += "".join(f"[{name}={value}]" for name, value in sorted(request.chat.chat_template_kwargs.items()))
        if "loop forever" in text:
            raise InvalidRequest.field("messages", "take too long to render")
        ids = list(text.encode())
        if request.max_tokens and len(ids) > request.max_tokens:
            raise ContextOverflow.field("text", f"{len(ids)} tokens; at most {request.max_tokens} fit")
        return tokenizer_pb2.EncodeResponse(token_ids=ids, fingerprint="bytes")

    async def Detokenize(self, request, context):
        return tokenizer_pb2.DetokenizeResponse(text=bytes(i for i in request.token_ids if i < 256).decode(errors="replace"))

    async def Decode(self, requests, context):
        mine = {}
        try:
            async for request in requests:
                texts, described = [], []
                self.openings += request.open
                for opening in request.open:
                    mine[opening.decoding_id] = self.open[opening.decoding_id] = _Decoding(opening)
                    for token in opening.replayed_ids:
                        texts += mine[opening.decoding_id].feed(token)
                for wanted in request.describe:
                    tokens = [bytes([i]) if i < 256 else b"" for i in wanted.token_ids]
                    described.append(tokenizer_pb2.DescribedTokens(decoding_id=wanted.decoding_id, tokens=tokens))
                for decoding_id, token in zip(request.decoding_ids, request.token_ids, strict=True):
                    if decoding_id in mine:
                        texts += mine[decoding_id].feed(token)
                for decoding_id in request.finished:
                    if decoding_id in mine:
                        texts += mine[decoding_id].finish()
                for decoding_id in [*request.closed, *(t.decoding_id for t in texts if t.last)]:
                    mine.pop(decoding_id, None)
                    self.open.pop(decoding_id, None)
                if texts or described:
                    yield tokenizer_pb2.DecodeResponse(texts=texts, described=described)
        finally:
            for decoding_id in mine:
                self.open.pop(decoding_id, None)


class _Decoding:
    def __init__(self, opening):
        self.opening = opening
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.held = ""
        self.offset = 0
        self.tokens = 0
        self.over = False

    def feed(self, token):
        if self.over:
            return []
        self.tokens += 1
        self.held += self.decoder.decode(bytes([token])) if token < 256 else ""
        for index, stop in enumerate(self.opening.stop):
            at = self.held.find(stop)
            if at >= 0:
                self.held = self.held[: at + len(stop) if self.opening.include_stop_text else at]
                self.over = True
                return [self._told(len(self.held), last=True, stop_index=index)]
        keep = max((n for stop in self.opening.stop for n in range(1, len(stop)) if self.held.endswith(stop[:n])), default=0)
        return [self._told(len(self.held) - keep)]

    def finish(self):
        if self.over:
            return []
        self.over = True
        return [self._told(len(self.held), last=True)]

    def _told(self, length, **more):
        text, self.held = self.held[:length], self.held[length:]
        offset, self.offset = self.offset, self.offset + len(text.encode())
        return tokenizer_pb2.DecodedText(
            decoding_id=self.opening.decoding_id, text=text, byte_offset=offset, tokens=self.tokens, **more
        )


class _Running:
    """A sequence on a fake executor. `arrived` once its KV has come; `told` once its first half of the work is done."""

    def __init__(self, start):
        self.start = start
        self.position = len(start.replayed_ids)
        self.told = self.arrived = False


class FakeExecutor(Served, executor_pb2_grpc.ExecutorServiceServicer):
    """Tells the story from where the replayed ids end. `gate` holds it up before each frame; `frame` tokens go into one.

    `hold_after` closes the gate as soon as so many frames were told: a test that closes it itself may come when all is told.

    Handoffs go through `handoffs`, which all executors share; `fail_handoffs` ends a half with that failure instead.
    """

    service_name = "penstock.internal.v1.ExecutorService"
    register = staticmethod(executor_pb2_grpc.add_ExecutorServiceServicer_to_server)

    def __init__(self, name, frame=3, story=STORY):
        super().__init__()
        self.name, self.frame, self.story = name, frame, [*story, EOS]
        self.gate = asyncio.Event()
        self.gate.set()
        self.started = asyncio.Event()
        self.all_started = []
        self.running = {}
        self.refuse = 0
        self.die_after = self.hold_after = None
        self.frames = 0
        self.fail_handoffs = None
        self.handoffs = {}

    async def Run(self, requests, context):
        mine, wake, over = {}, asyncio.Event(), []

        async def read():
            async for request in requests:
                for start in request.start:
                    self.all_started.append(start)
                    self.started.set()
                    if self.refuse:
                        self.refuse -= 1
                        over.append(_finished(start, executor_pb2.SEQUENCE_FINISH_REFUSED, message="draining"))
                    else:
                        mine[start.sequence_id] = self.running[start.sequence_id] = _Running(start)
                for sequence_id in request.aborted:
                    mine.pop(sequence_id, None)
                    self.running.pop(sequence_id, None)
                wake.set()

        reader = asyncio.create_task(read())
        try:
            while True:
                if not mine and not over:
                    wake.clear()
                    await wake.wait()
                await self.gate.wait()
                frame = executor_pb2.RunResponse(finished=over)
                over.clear()
                for entry in list(mine.values()):
                    self._step(frame, entry)
                for finished in frame.finished:
                    mine.pop(finished.sequence_id, None)
                    self.running.pop(finished.sequence_id, None)
                if isinstance(frame, Message) and frame.ByteSize():
                    yield frame
                    self.frames += 1
                    if self.frames == self.hold_after:
                        self.gate.clear()
                    if self.die_after is not None and self.frames >= self.die_after:
                        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(self.kill()))
                        await asyncio.Event().wait()
                await asyncio.sleep(0)
        finally:
            reader.cancel()
            for sequence_id in mine:
                self.running.pop(sequence_id, None)

    def _step(self, frame, entry):
        kind = entry.start.WhichOneof("handoff")
        if kind is not None and self.fail_handoffs is not None and not entry.arrived:
            failed = executor_pb2.SEQUENCE_FINISH_HANDOFF_FAILED
            frame.finished.append(_finished(entry.start, failed, handoff_failure=self.fail_handoffs))
        elif kind == "receive" and not entry.arrived:
            self._reserve(frame, entry)
        elif kind == "send" and entry.told:
            self._hand_over(frame, entry)
        else:
            self._tell(frame, entry, 1 if kind == "send" else self.frame)
            entry.told = True

    def _reserve(self, frame, entry):
        if not entry.told:
            entry.told = True
            ticket = handoff_pb2.HandoffTicket(handoff_id=f"{self.name}/{entry.start.sequence_id}".encode(), tokens=7, lease_ms=1)
            self.handoffs[ticket.handoff_id] = (self, entry)
            frame.reserved.add(sequence_id=entry.start.sequence_id, ticket=ticket)

    def _hand_over(self, frame, entry):
        executor, other = self.handoffs.pop(entry.start.send.ticket.handoff_id)
        if other.start.sequence_id not in executor.running:
            frame.finished.append(_finished(entry.start, executor_pb2.SEQUENCE_FINISH_HANDOFF_FAILED))
            return
        other.arrived, other.position = True, entry.position
        frame.finished.append(_finished(entry.start, executor_pb2.SEQUENCE_FINISH_HANDED_OFF))

    def _tell(self, frame, entry, tokens):
        start, position = entry.start, entry.position
        if start.WhichOneof("handoff") == "receive" and position == len(start.replayed_ids) + 1:
            frame.arrived.add(
                sequence_id=start.sequence_id,
                kv_bytes=4096,
                transfer_us=2000,
                exposed_us=1000,
                transport=handoff_pb2.HANDOFF_TRANSPORT_GRPC,
                native=True,
            )
        if position == len(start.replayed_ids):
            frame.started.add(sequence_id=start.sequence_id, cached_tokens=2, waited_us=5, prefill_us=7)
            if start.HasField("prompt_logprobs"):
                told = frame.prompt_logprobs.add(sequence_id=start.sequence_id)
                for i in range(1, len(start.prompt_ids)):
                    told.tokens.add(position=i, logprob=-0.5, rank=1, top_ids=[start.prompt_ids[i]], top_logprobs=[-0.5])
        for _ in range(tokens):
            token = self.story[position]
            if token == EOS and EOS not in start.stop_token_ids:
                token = ord("!")
            frame.sequence_ids.append(start.sequence_id)
            frame.token_ids.append(token)
            frame.positions.append(position)
            if start.HasField("logprobs"):
                top = [token, 65][: start.logprobs]
                frame.logprobs.add(
                    sequence_id=start.sequence_id,
                    position=position,
                    logprob=-1.5,
                    rank=1,
                    top_ids=top,
                    top_logprobs=[-1.5, -2.0][: len(top)],
                )
            position = min(position + 1, len(self.story) - 1) if EOS in start.stop_token_ids else position + 1
            if token in start.stop_token_ids:
                frame.finished.append(_finished(start, executor_pb2.SEQUENCE_FINISH_STOP))
                break
            if len(frame.positions) and frame.positions[-1] + 1 >= start.max_tokens:
                frame.finished.append(_finished(start, executor_pb2.SEQUENCE_FINISH_LENGTH))
                break
        entry.position = position


def _finished(start, reason, **more):
    return executor_pb2.FinishedSequence(sequence_id=start.sequence_id, reason=reason, **more)


class FakeScheduler(Served, scheduler_pb2_grpc.SchedulerServiceServicer):
    """Grants whatever executor is not to be avoided; with `apart`, prefill on the next. `gate` holds up grants, `refusal` refuses."""

    service_name = "penstock.internal.v1.SchedulerService"
    register = staticmethod(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server)

    def __init__(self, executors):
        super().__init__()
        self.executors = executors
        self.gate = asyncio.Event()
        self.gate.set()
        self.placed = asyncio.Event()
        self.announced_any = asyncio.Event()
        self.leases, self.queued, self.announced, self.placings = {}, {}, [], []
        self.apart = False
        self.prefilling = set()
        self.refusal = None
        self.gateways = []
        self.context_length = 4096

    def describe(self, executor):
        return scheduler_pb2.ExecutorDescription(
            executor_id=executor.name,
            address=executor.address,
            model="story",
            model_fingerprint="f" * 32,
            tokenizer_fingerprint="bytes",
            architecture="llama",
            backend="fake",
            device="cpu",
            context_length=self.context_length,
            vocabulary_size=300,
            kv_block_size=16,
            kv_blocks=100,
            fields=FIELDS,
            eos_token_ids=[EOS],
            prefill_chunk=96,
            calibration=scheduler_pb2.Calibration(
                prefill=scheduler_pb2.StepCurve(sizes=[16, 256], seconds=[0.5, 2.0]),
                decode=scheduler_pb2.StepCurve(sizes=[1, 8], seconds=[0.25, 0.5]),
                decode_context=16,
            ),
        )

    async def Place(self, requests, context):
        answers, leases = asyncio.Queue(), {}
        self.gateways.append(answers)
        catalog = scheduler_pb2.Catalog(executors=[self.describe(e) for e in self.executors])
        await answers.put(scheduler_pb2.PlaceResponse(catalog=catalog))

        async def grant(placing):
            await self.gate.wait()
            if placing.request_id not in self.queued:
                return
            if self.refusal is not None:
                del self.queued[placing.request_id]
                refusal = scheduler_pb2.Refusal(request_id=placing.request_id, **self.refusal)
                await answers.put(scheduler_pb2.PlaceResponse(refused=[refusal]))
                return
            fresh = [e for e in self.executors if e.name not in placing.avoid_executor_ids] or self.executors
            executor = fresh[0]
            del self.queued[placing.request_id]
            leases[placing.request_id] = self.leases[placing.request_id] = executor.name
            lease = scheduler_pb2.Lease(
                request_id=placing.request_id, executor_id=executor.name, address=executor.address, tokens=9
            )
            if self.apart:
                lease.prefill.executor_id, lease.prefill.address, lease.prefill.tokens = fresh[1].name, fresh[1].address, 7
                lease.reason = scheduler_pb2.PLACEMENT_REASON_COST
                self.prefilling.add(placing.request_id)
            await answers.put(scheduler_pb2.PlaceResponse(granted=[lease]))

        async def read():
            async for request in requests:
                for placing in request.place:
                    self.placings.append(placing)
                    self.queued[placing.request_id] = placing
                    self.placed.set()
                    tasks.append(asyncio.create_task(grant(placing)))
                self.prefilling -= {*request.prefilled, *request.released}
                for request_id in request.released:
                    self.leases.pop(request_id, None)
                    self.queued.pop(request_id, None)
                for lease in request.announced:
                    self.announced.append(lease)
                    self.leases[lease.request_id] = lease.executor_id
                    self.announced_any.set()

        tasks = []
        tasks.append(asyncio.create_task(read()))
        try:
            while True:
                yield await answers.get()
        finally:
            for task in tasks:
                task.cancel()
            self.leases.clear()
            self.queued.clear()
            self.prefilling.clear()

    async def tell_lost(self, executor):
        for answers in self.gateways:
            await answers.put(scheduler_pb2.PlaceResponse(lost_executor_ids=[executor.name]))

    async def ListExecutors(self, request, context):
        states = [
            scheduler_pb2.ExecutorState(
                description=self.describe(e), load=scheduler_pb2.Load(running=len(e.running), kv_blocks_free=99)
            )
            for e in self.executors
        ]
        return scheduler_pb2.ListExecutorsResponse(executors=states)


async def eventually(true):
    """Wait until it is true; the test's timeout is the bound."""
    while not true():
        await asyncio.sleep(0.002)


class Suite(SimpleNamespace):
    """A gateway between fakes."""

    async def stub(self, kind=inference_pb2_grpc.InferenceStub):
        return kind(self.channel)

    def at_rest(self):
        """Whether nothing is held anywhere on behalf of any request."""
        return (
            not any(self.gateway.counts().values())
            and not any(e.running for e in self.executors)
            and not self.tokenizer.open
            and not self.scheduler.leases
            and not self.scheduler.queued
            and not self.scheduler.prefilling
        )

    async def rest(self):
        await eventually(self.at_rest)


@contextlib.asynccontextmanager
async def running(executors=2, **settings):
    tokenizer = await FakeTokenizer().start()
    engines = [await FakeExecutor(f"executor-{i}").start() for i in range(executors)]
    for engine in engines:
        engine.handoffs = engines[0].handoffs
    scheduler = await FakeScheduler(engines).start()
    settings = {"http": "127.0.0.1:0", "grpc": "127.0.0.1:0", "default_deadline_seconds": 60.0} | settings
    gateway = GatewayServer(GatewayConfig(tokenizer=tokenizer.address, scheduler=scheduler.address, **settings))
    told = await gateway.start()
    await eventually(lambda: not gateway.not_ready())
    async with grpc.aio.insecure_channel(told["grpc"]) as channel:
        yield Suite(
            tokenizer=tokenizer,
            executors=engines,
            scheduler=scheduler,
            gateway=gateway,
            channel=channel,
            inference=inference_pb2_grpc.InferenceStub(channel),
            models=models_pb2_grpc.ModelsStub(channel),
            http=f"http://{told['http']}",
            grpc=told["grpc"],
            story=STORY.decode(),
            eos=EOS,
            eventually=eventually,
        )
    await gateway.close()
    for served in (tokenizer, scheduler, *engines):
        await served.kill()


@pytest.fixture
async def suite():
    async with running() as up:
        yield up


@pytest.fixture
def suite_with():
    """`async with suite_with(setting=…) as suite`: a suite with settings of its own."""
    return running
