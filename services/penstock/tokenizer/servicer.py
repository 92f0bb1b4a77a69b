"""`penstock.internal.v1.TokenizerService`: messages in, core calls, messages out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict

from penstock.common import tracing
from penstock.common.errors import InvalidRequest, PenstockError
from penstock.common.logs import logger
from penstock.internal.v1 import tokenizer_pb2 as pb
from penstock.internal.v1 import tokenizer_pb2_grpc as pb_grpc
from penstock.tokenizer.decoding import Decoding, Decodings
from penstock.tokenizer.encoding import Model, Models
from penstock.tokenizer.metrics import TokenizerMetrics

__all__ = ["TokenizerServicer"]

# Frames that may wait for their turn on one stream; beyond them HTTP/2's flow control holds the gateway back.
_QUEUED_FRAMES = 64


class TokenizerServicer(pb_grpc.TokenizerServiceServicer):
    """The RPCs over the loaded models."""

    def __init__(self, models: Models, metrics: TokenizerMetrics) -> None:
        self._models = models
        self._metrics = metrics
        self._streams: set[asyncio.Queue[pb.DecodeRequest | None]] = set()
        self._calls = 0
        self._leaving = False
        self._idle = asyncio.Event()

    async def leave(self) -> None:
        """End the decoding streams, which gateways take up again at the next tokenizer, and return when no other call runs."""
        self._leaving = True
        for frames in self._streams:
            while not frames.empty():
                frames.get_nowait()
            frames.put_nowait(None)
        self._note_end()
        await self._idle.wait()

    async def Encode(self, request: pb.EncodeRequest, context: object) -> pb.EncodeResponse:
        model = self._models.get(request.model)
        try:
            with self._call(), tracing.span("tokenize"), self._metrics.encode_seconds.time():
                ids = await self._encode(model, request)
        except PenstockError as error:
            self._metrics.refused.inc()
            logger().info("prompt refused", model=model.name, why=str(error)[:500])
            raise
        self._metrics.encoded.inc(len(ids))
        logger().debug("encoded", model=model.name, tokens=len(ids))
        return pb.EncodeResponse(token_ids=ids, fingerprint=model.vocabulary.fingerprint)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: object) -> pb.DetokenizeResponse:
        model = self._models.get(request.model)
        ids = list(request.token_ids)
        with self._call():
            text = await model.decode(ids, skip_special_tokens=request.skip_special_tokens)
        tokens = model.describe(ids) if request.tokens else []
        return pb.DetokenizeResponse(text=text, tokens=tokens, fingerprint=model.vocabulary.fingerprint)

    async def Decode(self, request_iterator: AsyncIterator[pb.DecodeRequest], context: object) -> AsyncIterator[pb.DecodeResponse]:
        stream = _DecodeStream(self._models, self._metrics)
        frames: asyncio.Queue[pb.DecodeRequest | None] = asyncio.Queue(_QUEUED_FRAMES)
        reader = asyncio.create_task(_read(request_iterator, frames))
        self._streams.add(frames)
        try:
            if self._leaving:
                return
            while (frame := await frames.get()) is not None:
                stream.take_in(frame)
                # Frames that came meanwhile are answered together.
                while not frames.empty() and (frame := frames.get_nowait()) is not None:
                    stream.take_in(frame)
                if (answer := stream.answer()) is not None:
                    yield answer
                if frame is None:
                    return
        finally:
            self._streams.discard(frames)
            self._note_end()
            stream.close()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        self._calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            self._note_end()

    def _note_end(self) -> None:
        if self._leaving and not self._calls and not self._streams:
            self._idle.set()

    async def _encode(self, model: Model, request: pb.EncodeRequest) -> list[int]:
        match request.WhichOneof("input"):
            case "text":
                return await model.encode(
                    request.text, add_special_tokens=request.add_special_tokens, max_tokens=request.max_tokens
                )
            case "chat":
                return await model.encode_chat(
                    [_message(m) for m in request.chat.messages],
                    add_generation_prompt=request.chat.add_generation_prompt,
                    continue_final_message=request.chat.continue_final_message,
                    chat_template_kwargs={k: _whole(v) for k, v in MessageToDict(request.chat.chat_template_kwargs).items()},
                    max_tokens=request.max_tokens,
                )
            case _:
                raise InvalidRequest.field("input", "must be text or chat")


class _DecodeStream:
    """One gateway's decodings, between messages and core."""

    def __init__(self, models: Models, metrics: TokenizerMetrics) -> None:
        self._models = models
        self._metrics = metrics
        self._decodings = Decodings()
        self._counted = 0
        self._texts: list[pb.DecodedText] = []
        self._described: list[pb.DescribedTokens] = []
        metrics.streams.inc()

    def take_in(self, frame: pb.DecodeRequest) -> None:
        """Do what a frame says, in the order that the contract states."""
        for opening in frame.open:
            self._open(opening)
        if frame.describe:
            self._describe(frame.describe)
        decodings = self._decodings
        if frame.decoding_ids or frame.token_ids:
            if len(frame.decoding_ids) != len(frame.token_ids):
                raise InvalidRequest.field(
                    "token_ids", f"{len(frame.token_ids)} of them for {len(frame.decoding_ids)} decoding_ids"
                )
            decodings.feed(list(frame.decoding_ids), list(frame.token_ids))
            self._metrics.decoded.inc(len(frame.token_ids))
        if frame.finished:
            decodings.finish(frame.finished)
        if frame.closed:
            self._forget(frame.closed)

    def answer(self) -> pb.DecodeResponse | None:
        """One message for all frames taken in since the last one; None where there is nothing to tell."""
        answer = pb.DecodeResponse(texts=self._texts, described=self._described)
        self._texts, self._described = [], []
        # Made in place: a text of its own would be copied.
        add = answer.texts.add
        for decoded in self._decodings.take():
            decoding_id, text, byte_offset, tokens, _, last = decoded
            if last:
                add(**decoded._asdict())
            else:
                add(decoding_id=decoding_id, text=text, byte_offset=byte_offset, tokens=tokens)
        self._count()
        return answer if answer.texts or answer.described else None

    def close(self) -> None:
        """Forget everything."""
        self._decodings = Decodings()
        self._count()
        self._metrics.streams.dec()

    def _open(self, opening: pb.OpenDecoding) -> None:
        model = self._models.find(opening.model)
        if model is None:
            # It has no text, and the other decodings of the stream go on.
            self._texts.append(pb.DecodedText(decoding_id=opening.decoding_id, last=True))
            return
        detokenizer = model.detokenizer(skip_special_tokens=opening.skip_special_tokens)
        detokenizer.follow(list(opening.preceding_ids))
        decoding = Decoding(
            opening.decoding_id,
            detokenizer,
            list(opening.stop),
            include_stop=opening.include_stop_text,
            min_tokens=opening.min_tokens,
            describe=model.describe,
        )
        self._decodings.open(decoding, list(opening.replayed_ids))

    def _describe(self, wanted: Iterable[pb.DescribeTokens]) -> None:
        for one in wanted:
            decoding = self._decodings.get(one.decoding_id)
            if decoding is not None:
                self._described.append(pb.DescribedTokens(decoding_id=one.decoding_id, tokens=decoding.describe(one.token_ids)))

    def _forget(self, decoding_ids: Sequence[int]) -> None:
        self._decodings.close(decoding_ids)
        # Their answers must not be told either, where this frame is answered together with the one that opened them.
        closed = set(decoding_ids)
        self._described = [d for d in self._described if d.decoding_id not in closed]
        self._texts = [t for t in self._texts if t.decoding_id not in closed]

    def _count(self) -> None:
        if (now := len(self._decodings)) != self._counted:
            self._metrics.decodings.inc(now - self._counted)
            self._counted = now


async def _read(source: AsyncIterator[pb.DecodeRequest], frames: asyncio.Queue[pb.DecodeRequest | None]) -> None:
    try:
        async for frame in source:
            await frames.put(frame)
    except Exception:
        await frames.put(None)
        raise
    await frames.put(None)


def _message(message: pb.ChatMessage) -> dict[str, str]:
    turn = {"role": message.role, "content": message.content}
    return turn | {"name": message.name} if message.name else turn


def _whole(value: Any) -> Any:
    """A Struct's numbers are all floating-point; a template would write 5.0 for 5."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
