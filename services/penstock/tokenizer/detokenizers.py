"""Ids to text, one by one: the texts that `feed` and `finish` return, joined, are the text of decoding all ids at once."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

from penstock.tokenizer.pieces import Pieces

__all__ = ["Detokenizer", "PrefixDetokenizer", "TableDetokenizer"]


class Detokenizer(Protocol):
    """Text of a growing sequence of ids. Ids that the tokenizer does not know add nothing."""

    def follow(self, ids: Sequence[int]) -> None:
        """Before the first id: the text goes on with that of these."""

    def feed(self, token_id: int) -> str:
        """The text that is certain now that this id has come."""

    def finish(self) -> str:
        """What was held back, now that no more ids come."""


class TableDetokenizer:
    """Decodes by the tables of `Pieces`, holding back bytes that are not a character yet."""

    __slots__ = ("_first", "_held", "_pieces", "_raw", "_strip", "_texts", "_whole_runs")

    def __init__(self, pieces: Pieces, *, skip_special_tokens: bool) -> None:
        self._pieces = pieces
        self._texts = pieces.texts_without_special if skip_special_tokens else pieces.texts
        self._raw = pieces.raw
        self._whole_runs = pieces.whole_runs
        self._held = b""
        self._first = pieces.first_text is not None
        self._strip = pieces.strip[1]

    def follow(self, ids: Sequence[int]) -> None:
        for token_id in ids:
            self.feed(token_id)
        self._held = b""  # of the other text, whatever comes

    def feed(self, token_id: int) -> str:
        try:
            text = self._texts[token_id]
        except IndexError:
            return ""
        if text and not self._held and not self._first and not self._strip:
            return text
        if text == "":
            return ""
        return self._begin(self._join(token_id, text))

    def finish(self) -> str:
        return self._begin(self._release(self._held)) if self._held else ""

    def _join(self, token_id: int, text: str | None) -> str:
        if self._first:
            self._first = False
            return self._pieces.first_text(token_id) if self._pieces.first_text is not None else text or ""
        if text is None and self._whole_runs:
            self._held += self._raw[token_id]
            return ""
        if self._whole_runs:
            held, self._held = self._held, b""
            return self._release(held) + (text or "")
        joined = self._held + self._raw[token_id]
        text, consumed = utf_8_decode(joined, "replace", False)
        self._held = joined[consumed:]
        return text

    def _release(self, held: bytes) -> str:
        self._held = b""
        if not self._whole_runs:
            return held.decode("utf-8", "replace")
        try:
            return held.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(held)

    def _begin(self, text: str) -> str:
        """Strip the beginning of the whole text; nothing later."""
        char = self._pieces.strip[0]
        while self._strip and text:
            if not text.startswith(char):
                self._strip = 0
                break
            text = text[len(char) :]
            self._strip -= 1
        return text


class PrefixDetokenizer:
    """Decodes by any decoder: the text that an id adds is what decoding with it gives beyond decoding without it.

    Only ids since the last text but one are decoded again, as Hugging Face's text-generation-inference does it. A decoder whose
    earlier text depends on later ids can not be streamed; what such a one gives at once may differ from what was streamed.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._prefix = 0
        self._read = 0
        self._told = ""

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def follow(self, ids: Sequence[int]) -> None:
        self._ids, self._read = list(ids), len(ids)
        self._told = self._decode(self._ids)

    def feed(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if len(after) <= len(before) or after.endswith("\ufffd") or not after.startswith(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        self._told += after[len(before) :]
        return after[len(before) :]

    def finish(self) -> str:
        whole = self._decode(self._ids)
        return whole[len(self._told) :] if whole.startswith(self._told) else ""
