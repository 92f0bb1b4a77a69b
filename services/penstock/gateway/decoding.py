"""The tokenizer's decoding stream, as the state machine's `DecodingPort`: one `Decode` stream, opened again when it is lost."""

from __future__ import annotations

from collections.abc import Sequence

import grpc.aio

from penstock.gateway.choice import Choice
from penstock.gateway.ports import Text
from penstock.gateway.stream import Stream
from penstock.internal.v1 import tokenizer_pb2, tokenizer_pb2_grpc

__all__ = ["TokenizerDecoding"]


class TokenizerDecoding:
    """Decodes choices. What one frame of an executor brings leaves as one message after `flush`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._choices: dict[int, Choice] = {}
        self._clear()
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._stream = Stream("tokenizer", lambda: stub.Decode(wait_for_ready=True), self, forever=True)

    def _clear(self) -> None:
        self._decoding_ids: list[int] = []
        self._token_ids: list[int] = []
        self._open: list[tokenizer_pb2.OpenDecoding] = []
        self._finished: list[int] = []
        self._closed: list[int] = []
        self._describe: list[tokenizer_pb2.DescribeTokens] = []

    @property
    def live(self) -> int:
        """Decodings that are open."""
        return len(self._choices)

    async def run(self) -> None:
        """Keep the stream, for ever."""
        await self._stream.run()

    def flush(self) -> None:
        """Send what is pending."""
        self._stream.wake()

    # Decoding

    def open(self, choice: Choice) -> None:
        """Begin to decode a choice, from the tokens that it has already."""
        plan = choice.request.plan
        self._choices[choice.decoding_id] = choice
        self._open.append(
            tokenizer_pb2.OpenDecoding(
                decoding_id=choice.decoding_id,
                model=plan.model,
                stop=plan.stop,
                include_stop_text=plan.include_stop_text,
                skip_special_tokens=not plan.reporting.special_tokens,
                replayed_ids=choice.decodable_ids,
                min_tokens=plan.min_tokens,
                preceding_ids=plan.preceding_ids,
            )
        )

    def token(self, decoding_id: int, token_id: int) -> None:
        """The next token."""
        self._decoding_ids.append(decoding_id)
        self._token_ids.append(token_id)

    def describe(self, choice: Choice, token_ids: Sequence[int]) -> None:
        """Ask for the tokens' own bytes."""
        self._describe.append(tokenizer_pb2.DescribeTokens(decoding_id=choice.decoding_id, token_ids=token_ids))

    def finish(self, decoding_id: int) -> None:
        """No token follows."""
        self._finished.append(decoding_id)
        self._stream.wake()

    def close(self, decoding_id: int) -> None:
        """Forget a decoding."""
        if self._choices.pop(decoding_id, None) is not None:
            self._closed.append(decoding_id)
            self._stream.wake()

    # The stream's peer

    def opened(self) -> None:
        """Rebuild every decoding: this tokenizer knows none."""
        self._clear()
        for choice in list(self._choices.values()):
            choice.request.tokenizer_back(choice)

    def next_message(self) -> tokenizer_pb2.DecodeRequest | None:
        """All that is pending."""
        if not (self._decoding_ids or self._open or self._finished or self._closed or self._describe):
            return None
        message = tokenizer_pb2.DecodeRequest(
            decoding_ids=self._decoding_ids,
            token_ids=self._token_ids,
            finished=self._finished,
            open=self._open,
            closed=self._closed,
            describe=self._describe,
        )
        self._clear()
        return message

    def received(self, message: tokenizer_pb2.DecodeResponse) -> None:
        """Texts and the bytes of tokens."""
        choices = self._choices
        for described in message.described:
            choice = choices.get(described.decoding_id)
            if choice is not None:
                choice.request.described(choice, described.tokens)
        for decoded in message.texts:
            choice = choices.get(decoded.decoding_id)
            if choice is None:
                continue
            last = decoded.last
            stop_index = decoded.stop_index if last and decoded.HasField("stop_index") else None
            if last:
                del choices[decoded.decoding_id]
            choice.request.text(choice, Text(decoded.text, decoded.byte_offset, decoded.tokens, stop_index, last))

    def lost(self, why: str) -> None:
        """Tokens that come meanwhile are kept by their choices."""
