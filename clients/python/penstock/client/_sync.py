"""The client for programs without asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from penstock.client import _messages as read
from penstock.client import _options as write
from penstock.client._options import ChatOptions, Message, Options, Prompt, Rendering
from penstock.client._results import Closing, Event, Model, Result, TokenCount, collect
from penstock.client._transport import TLS, Attempts, Metadata, channel_options, checked_target, credentials, metadata
from penstock.client.errors import ClientClosed, InternalError, StreamConsumed, from_rpc
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc

__all__ = ["Client", "Stream"]

T = TypeVar("T")


class Stream:
    """The answer to one request, as it comes. Iterate over it once, or ask for all of it.

    Leaving ``with``, `close`, or giving up the iteration cancels the request on the server. Every error is a
    `penstock.client.PenstockError`; a second reading is `penstock.client.StreamConsumed`.

    Attributes:
        closing: usage, placement and times; None until the stream has ended.
    """

    def __init__(self, start: Callable[[float | None], Any], attempts: Attempts) -> None:
        self._start = start
        self._attempts = attempts
        self._call: Any = None
        self._begun = False
        self._closed = threading.Event()
        self._read = False
        self.closing: Closing | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Iterator[Event]:
        if self._read:
            raise StreamConsumed
        self._read = True
        return self._events()

    def _events(self) -> Iterator[Event]:
        try:
            while (answer := self._next()) is not None:
                if answer.HasField("closing"):
                    self.closing = read.closing_of(answer.closing)
                else:
                    yield read.event_of(answer)
        finally:
            self.close()

    def text(self) -> str:
        """Text of the first choice, once it is whole."""
        return self.result().text

    def result(self) -> Result:
        """All choices, once they are whole."""
        events = list(self)
        if self.closing is None:
            raise InternalError("the stream ended without its closing message")
        return collect(events, self.closing)

    def close(self) -> None:
        """Cancel what still runs; also from another thread. Idempotent."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    def _next(self) -> read.Answer | None:
        while not self._closed.is_set():
            try:
                if self._call is None:
                    self._call = self._start(self._attempts.remaining())
                    if self._closed.is_set():  # by another thread, which had no call to cancel
                        self._call.cancel()
                answer: read.Answer | None = next(self._call, None)
            except grpc.RpcError as error:
                if self._closed.is_set():
                    return None
                self._wait_to_retry(error)
                continue
            self._begun = True
            return answer
        return None

    def _wait_to_retry(self, error: grpc.RpcError) -> None:
        delay = None if self._begun else self._attempts.delay(error)
        if delay is None:
            raise from_rpc(error) from None
        self._call = None
        self._closed.wait(delay)


class Client:
    """A client of one server, or of several behind one name; threads may share it.

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
        secret, options = credentials(tls), channel_options(retries)
        address = checked_target(target)
        self._channel = (
            grpc.insecure_channel(address, options=options)
            if secret is None
            else grpc.secure_channel(address, secret, options=options)
        )
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._models = models_pb2_grpc.ModelsStub(self._channel)
        self._api_key = api_key
        self._timeout = timeout
        self._retries = retries
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all calls, which fail with `penstock.client.Cancelled`, and close the connection. Idempotent."""
        self._closed = True
        self._channel.close()

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Stream:
        """Continue a prompt, given as text or as token ids."""
        return self._stream(self._inference.Generate, write.generate_request(prompt, options), options)

    def chat(self, messages: Sequence[Message | Mapping[str, str]], **options: Unpack[ChatOptions]) -> Stream:
        """Answer a conversation, or go on with the text of its last message.

        `chat_template_kwargs` is what the model's chat template reads beside the messages, such as ``{"enable_thinking": False}``.
        """
        return self._stream(self._inference.Chat, write.chat_request(messages, options), options)

    def count_tokens(
        self,
        prompt: Prompt | Sequence[Message | Mapping[str, str]],
        *,
        model: str = "",
        token_ids: bool = False,
        timeout: float | None = None,
        **rendering: Unpack[Rendering],
    ) -> TokenCount:
        """Tokens of a prompt or a conversation, which is not run; with the ids if `token_ids`."""
        request = write.count_request(prompt, rendering, model=model, token_ids=token_ids)
        return read.token_count_of(self._unary(self._inference.CountTokens, request, timeout))

    def models(self, *, timeout: float | None = None) -> list[Model]:
        """The models that are served."""
        answer = self._unary(self._models.ListModels, models_pb2.ListModelsRequest(), timeout)
        return [read.model_of(model) for model in answer.models]

    def model(self, name: str, *, timeout: float | None = None) -> Model:
        """One model.

        Raises:
            UnknownModel: it is not served.
        """
        return read.model_of(self._unary(self._models.GetModel, models_pb2.GetModelRequest(name=name), timeout).model)

    def _stream(self, method: Callable[..., Any], request: pb.GenerateRequest | pb.ChatRequest, options: Options) -> Stream:
        if self._closed:
            raise ClientClosed
        sent = metadata(self._api_key, options)
        timeout = options.get("timeout", self._timeout)
        return Stream(lambda left: self._begin(method, request, left, sent), Attempts(timeout, self._retries))

    def _unary(self, method: Callable[..., T], request: object, timeout: float | None) -> T:
        attempts = Attempts(self._timeout if timeout is None else timeout, self._retries)
        while True:
            try:
                return self._begin(method, request, attempts.remaining(), metadata(self._api_key, {}))
            except grpc.RpcError as error:
                if (delay := attempts.delay(error)) is None:
                    raise from_rpc(error) from None
                time.sleep(delay)

    def _begin(self, method: Callable[..., T], request: object, left: float | None, sent: Metadata) -> T:
        try:
            return method(request, timeout=left, metadata=sent)
        except ValueError:  # grpc's, of a closed channel
            if not self._closed:
                raise
            raise ClientClosed from None
