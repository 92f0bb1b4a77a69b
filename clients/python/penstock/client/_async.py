"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import cached_property
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from penstock.client import _messages as read
from penstock.client import _options as write
from penstock.client._options import ChatOptions, Message, Options, Prompt, Rendering
from penstock.client._results import Closing, Event, Model, Result, TokenCount, collect
from penstock.client._transport import TLS, Attempts, Metadata, channel_options, checked_target, credentials, metadata
from penstock.client.errors import Cancelled, ClientClosed, InternalError, StreamConsumed, from_rpc
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc

__all__ = ["AsyncClient", "AsyncStream"]

T = TypeVar("T")


class AsyncStream:
    """The answer to one request, as it comes. Iterate over it once, or ask for all of it.

    Leaving ``async with``, `close`, or giving up the iteration cancels the request on the server. Every error is a
    `penstock.client.PenstockError`; a second reading is `penstock.client.StreamConsumed`.

    Attributes:
        closing: usage, placement and times; None until the stream has ended.
    """

    def __init__(self, start: Callable[[float | None], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._call: Any = None
        self._begun = False
        self._cancelled = False
        self._read = False
        self.closing: Closing | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        if self._read:
            raise StreamConsumed
        self._read = True
        return _Events(self)

    async def text(self) -> str:
        """Text of the first choice, once it is whole."""
        return (await self.result()).text

    async def result(self) -> Result:
        """All choices, once they are whole."""
        events = [event async for event in self]
        if self.closing is None:
            raise InternalError("the stream ended without its closing message")
        return collect(events, self.closing)

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def _next(self) -> Event:
        while True:
            if self._cancelled:
                raise StopAsyncIteration
            try:
                if self._call is None:
                    self._call = self._start(self._attempts.remaining())
                answer = await self._call.read()
            except grpc.RpcError as error:
                await self._wait_to_retry(error)
                continue
            except asyncio.CancelledError:
                if self._cancelled and not _being_cancelled():
                    raise StopAsyncIteration from None
                self.close()
                _raise_if_closed_under()
                raise
            if answer is grpc.aio.EOF:
                self._cancelled = True
                raise StopAsyncIteration
            self._begun = True
            if not answer.HasField("closing"):
                return read.event_of(answer)
            self.closing = read.closing_of(answer.closing)

    async def _wait_to_retry(self, error: grpc.RpcError) -> None:
        delay = None if self._begun else self._attempts.delay(error)
        if delay is None:
            raise from_rpc(error) from None
        self._call = None
        await asyncio.sleep(delay)


class _Events:
    """One iteration over a stream; given up, it cancels the request."""

    def __init__(self, stream: AsyncStream) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self._stream._next()  # noqa: SLF001 - two halves of one thing

    def __del__(self) -> None:
        self._stream.close()


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _raise_if_closed_under() -> None:
    """A closing channel cancels its calls as if somebody had cancelled the task, which is told apart here."""
    if not _being_cancelled():
        raise Cancelled("the client was closed while the call ran") from None


class AsyncClient:
    """A client of one server, or of several behind one name.

    Closed, it stays so: every further call is a `penstock.client.ClientClosed`.

    Args:
        target: HOST:PORT, or a target with a scheme that gRPC resolves, such as ``dns:///HOST:PORT`` or ``unix:PATH``.
        api_key: sent with every call.
        tls: True for TLS with the system's roots, bytes for roots of your own (PEM), or gRPC channel credentials.
        timeout: deadline of each call in seconds, unless it has its own; None: no deadline.
        retries: further attempts of a call that has not begun to answer, where the server is away or asks to come again.

    Raises:
        ValueError: `target` is no such address, http://HOST:PORT for one.
    """

    def __init__(
        self, target: str, *, api_key: str | None = None, tls: TLS = False, timeout: float | None = None, retries: int = 3
    ) -> None:
        self._target = checked_target(target)
        self._api_key = api_key
        self._tls = tls
        self._timeout = timeout
        self._retries = retries
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all calls, which fail with `penstock.client.Cancelled`, and close the connection. Idempotent."""
        self._closed = True
        if "_channel" in self.__dict__:
            await self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncStream:
        """Continue a prompt, given as text or as token ids."""
        request = write.generate_request(prompt, options)
        return self._stream(self._inference.Generate, request, options)

    def chat(self, messages: Sequence[Message | Mapping[str, str]], **options: Unpack[ChatOptions]) -> AsyncStream:
        """Answer a conversation, or go on with the text of its last message.

        `chat_template_kwargs` is what the model's chat template reads beside the messages, such as ``{"enable_thinking": False}``.
        """
        return self._stream(self._inference.Chat, write.chat_request(messages, options), options)

    async def count_tokens(
        self,
        prompt: Prompt | Sequence[Message | Mapping[str, str]],
        *,
        model: str = "",
        token_ids: bool = False,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC enforces it, on the server too
        **rendering: Unpack[Rendering],
    ) -> TokenCount:
        """Tokens of a prompt or a conversation, which is not run; with the ids if `token_ids`."""
        request = write.count_request(prompt, rendering, model=model, token_ids=token_ids)
        return read.token_count_of(await self._unary(self._inference.CountTokens, request, timeout))

    async def models(self, *, timeout: float | None = None) -> list[Model]:  # noqa: ASYNC109 - the same
        """The models that are served."""
        answer = await self._unary(self._models.ListModels, models_pb2.ListModelsRequest(), timeout)
        return [read.model_of(model) for model in answer.models]

    async def model(self, name: str, *, timeout: float | None = None) -> Model:  # noqa: ASYNC109 - the same
        """One model.

        Raises:
            UnknownModel: it is not served.
        """
        answer = await self._unary(self._models.GetModel, models_pb2.GetModelRequest(name=name), timeout)
        return read.model_of(answer.model)

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Made at the first call, which has the loop that the channel belongs to.
        secret, options = credentials(self._tls), channel_options(self._retries)
        if secret is None:
            return grpc.aio.insecure_channel(self._target, options=options)
        return grpc.aio.secure_channel(self._target, secret, options=options)

    def _open(self) -> grpc.aio.Channel:
        if self._closed:  # a stub of a closed channel reads memory that grpc has freed
            raise ClientClosed
        return self._channel

    @cached_property
    def _inference(self) -> inference_pb2_grpc.InferenceAsyncStub:
        return inference_pb2_grpc.InferenceStub(self._open())

    @cached_property
    def _models(self) -> models_pb2_grpc.ModelsAsyncStub:
        return models_pb2_grpc.ModelsStub(self._open())

    def _stream(self, method: Callable[..., Any], request: pb.GenerateRequest | pb.ChatRequest, options: Options) -> AsyncStream:
        if self._closed:
            raise ClientClosed
        sent = metadata(self._api_key, options)
        timeout = options.get("timeout", self._timeout)
        return AsyncStream(lambda left: self._begin(method, request, left, sent), Attempts(timeout, self._retries))

    async def _unary(self, method: Callable[..., Awaitable[T]], request: object, timeout: float | None) -> T:  # noqa: ASYNC109 - the same
        attempts = Attempts(self._timeout if timeout is None else timeout, self._retries)
        while True:
            try:
                return await self._begin(method, request, attempts.remaining(), metadata(self._api_key, {}))
            except grpc.RpcError as error:
                if (delay := attempts.delay(error)) is None:
                    raise from_rpc(error) from None
                await asyncio.sleep(delay)
            except asyncio.CancelledError:
                _raise_if_closed_under()
                raise

    def _begin(self, method: Callable[..., T], request: object, left: float | None, sent: Metadata) -> T:
        if self._closed:
            raise ClientClosed
        return method(request, timeout=left, metadata=sent)
