"""Decodings of one stream: tokens in, text out, stop texts found on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from penstock.tokenizer.detokenizers import Detokenizer
from penstock.tokenizer.stops import StopTexts, stop_texts

__all__ = ["DecodedText", "Decoding", "Decodings"]


class DecodedText(NamedTuple):
    """What a frame adds to one decoding; see `DecodedText` of the wire, whose fields these are."""

    decoding_id: int
    text: str
    byte_offset: int
    tokens: int
    stop_index: int | None
    last: bool


def _undescribed(token_ids: Sequence[int]) -> list[bytes]:
    return [b""] * len(token_ids)


class Decoding:
    """The text of one answer. `feed` its tokens, `take` what can be told; over once `last`."""

    __slots__ = (
        "_detokenizer",
        "_held",
        "_include_stop",
        "_min_tokens",
        "_offset",
        "_ready",
        "_state",
        "_stops",
        "decoding_id",
        "describe",
        "last",
        "stop_index",
        "tokens",
        "touched",
    )

    def __init__(
        self,
        decoding_id: int,
        detokenizer: Detokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
        describe: Callable[[Sequence[int]], list[bytes]] = _undescribed,
    ) -> None:
        self.decoding_id = decoding_id
        self.describe = describe
        self.tokens = 0
        self.last = False
        self.touched = False
        self.stop_index: int | None = None
        self._detokenizer = detokenizer
        self._stops: StopTexts | None = stop_texts(tuple(stop)) if any(stop) else None
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._state = 0
        self._held = ""
        self._ready = ""
        self._offset = 0

    def feed(self, token_id: int) -> None:
        """Take the next token; ignored once a stop text was found."""
        if self.last:
            return
        self.tokens += 1
        text = self._detokenizer.feed(token_id)
        if not text:
            return
        if self._stops is None:
            self._ready += text
        else:
            self._match(self._stops, text)

    def finish(self) -> None:
        """Let out what was held back: no more tokens come."""
        if self.last:
            return
        text = self._detokenizer.finish()
        if self._stops is None:
            self._ready += text
        elif text:
            self._match(self._stops, text)
        if not self.last:
            self._ready += self._held
            self.last = True

    def take(self) -> DecodedText:
        """What can be told since the last call."""
        text, offset = self._ready, self._offset
        self._ready = ""
        self.touched = False
        self._offset = offset + (len(text) if text.isascii() else len(text.encode()))
        return DecodedText(self.decoding_id, text, offset, self.tokens, self.stop_index, self.last)

    def _match(self, stops: StopTexts, text: str) -> None:
        state = self._state
        if not state and stops.first.isdisjoint(text):
            self._ready += text
            return
        counts = self.tokens >= self._min_tokens
        step, match = stops.step, stops.match
        for index, char in enumerate(text):
            state = step(state, char)
            if counts and match[state] >= 0:
                self._stop(stops, match[state], self._held + text[: index + 1])
                return
        text = self._held + text
        kept = len(text) - stops.held[state]
        self._state = state
        self._ready += text[:kept]
        self._held = text[kept:]

    def _stop(self, stops: StopTexts, position: int, text: str) -> None:
        self.stop_index = position
        self.last = True
        self._ready += text if self._include_stop else text[: len(text) - stops.lengths[position]]


class Decodings:
    """All decodings of one stream: `open`, `feed`, `finish` and `close` as frames say, then `take` what they led to.

    Ids that are not open are ignored: a decoding may have ended while its tokens were on the way.
    """

    def __init__(self) -> None:
        self._open: dict[int, Decoding] = {}
        self._touched: list[Decoding] = []

    def __len__(self) -> int:
        return len(self._open)

    def get(self, decoding_id: int) -> Decoding | None:
        """The decoding of this id, if it is open."""
        return self._open.get(decoding_id)

    def open(self, decoding: Decoding, replayed_ids: Sequence[int] = ()) -> None:
        """Begin a decoding; its replayed tokens, if any, are told again."""
        self._open[decoding.decoding_id] = decoding
        self.feed([decoding.decoding_id] * len(replayed_ids), replayed_ids)

    def feed(self, decoding_ids: Sequence[int], token_ids: Sequence[int]) -> None:
        """Take the columns of a frame: the next tokens of decodings.

        Raises:
            ValueError: the columns differ in length.
        """
        find = self._open.get
        touched = self._touched
        for decoding_id, token_id in zip(decoding_ids, token_ids, strict=True):
            decoding = find(decoding_id)
            if decoding is None:
                continue
            decoding.feed(token_id)
            if not decoding.touched:
                decoding.touched = True
                touched.append(decoding)

    def finish(self, decoding_ids: Iterable[int]) -> None:
        """End decodings whose tokens have all come."""
        for decoding_id in decoding_ids:
            decoding = self._open.get(decoding_id)
            if decoding is None:
                continue
            decoding.finish()
            if not decoding.touched:
                decoding.touched = True
                self._touched.append(decoding)

    def close(self, decoding_ids: Iterable[int]) -> None:
        """Forget decodings."""
        for decoding_id in decoding_ids:
            decoding = self._open.pop(decoding_id, None)
            if decoding is not None:
                decoding.touched = False

    def take(self) -> list[DecodedText]:
        """What every decoding that moved on since the last call has to tell; those that ended are forgotten."""
        texts = [decoding.take() for decoding in self._touched if decoding.touched]
        self._touched = []
        for one in texts:
            if one.last:
                self._open.pop(one.decoding_id, None)
        return texts
