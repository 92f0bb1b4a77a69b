"""What each token id adds to a text, worked out once per tokenizer, so that decoding a token is one look into a table.

Most decoders of the `tokenizers` library are a map from tokens to text or bytes, followed by a join; they differ in the join. Read
from the library's decoders (`ByteLevel`, `ByteFallback`, `Metaspace`, `WordPiece`, `Replace`, `Fuse`, `Strip`):

- *UTF-8*: bytes of all tokens, joined, decoded; what is invalid becomes U+FFFD (byte-level BPE).
- *runs*: text, but for a run of byte tokens, which becomes its text if the whole run is valid and a U+FFFD per byte otherwise
  (sentencepiece with byte fallback).

The first token may read differently from the others (`Metaspace`, `WordPiece`), and leading characters may be stripped.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers

__all__ = ["Pieces", "pieces_of", "token_bytes"]

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Pieces:
    """The tables of one tokenizer.

    Attributes:
        texts: text of each id; None where it is bytes that only their neighbours complete; "" where it adds nothing at all.
        texts_without_special: the same, with "" for special tokens.
        raw: bytes of each id.
        first_text: text of an id that stands first; None where that makes no difference.
        whole_runs: whether bytes join by runs (see above) rather than as UTF-8.
        strip: characters to strip from the beginning of the text: at most this many of this one.
    """

    texts: Sequence[str | None]
    texts_without_special: Sequence[str | None]
    raw: Sequence[bytes]
    first_text: Callable[[int], str] | None = None
    whole_runs: bool = False
    strip: tuple[str, int] = ("", 0)


def token_bytes(tokenizer: Tokenizer, pieces: Pieces | None, token_id: int) -> bytes:
    """The bytes of one token, alone; empty for an unknown id."""
    if pieces is not None:
        return pieces.raw[token_id] if token_id < len(pieces.raw) else b""
    return (tokenizer.id_to_token(token_id) or "").encode()


def pieces_of(tokenizer: Tokenizer) -> Pieces | None:
    """The tables of a tokenizer, or None where its decoder is not one of those that tables can stand for."""
    steps = _steps(json.loads(tokenizer.to_str())["decoder"])
    tokens = _tokens(tokenizer)
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    kinds = [step["type"] for step in steps]
    pieces: Pieces | None
    if kinds == ["ByteLevel"]:
        pieces = _byte_level(tokens, special)
    elif not steps or kinds in (["Metaspace"], ["WordPiece"]):
        pieces = _first_differs(tokens, special, steps[0] if steps else {"type": "Join"})
    else:
        pieces = _replacing(tokens, special, steps)
    return pieces if pieces and _agrees(tokenizer, pieces) else None


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [s for d in decoder["decoders"] for s in _steps(d)] if decoder["type"] == "Sequence" else [decoder]


def _tokens(tokenizer: Tokenizer) -> list[str | None]:
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    return [tokenizer.id_to_token(i) for i in range(size)]


def _without(texts: Sequence[str | None], tokens: Sequence[str | None], special: set[str]) -> list[str | None]:
    return ["" if token in special else text for text, token in zip(texts, tokens, strict=True)]


def _byte_level(tokens: Sequence[str | None], special: set[str]) -> Pieces:
    # Latin-1 characters that stand for no byte are led out of Latin-1, so that encoding tells them.
    byte_of = dict.fromkeys(range(256), 0x100) | {ord(char): byte for char, byte in _byte_level_alphabet().items()}
    raw, texts = list[bytes](), list[str | None]()
    for token in tokens:
        piece = _mapped(token or "", byte_of)
        raw.append(piece)
        try:
            texts.append(piece.decode())
        except UnicodeDecodeError:
            texts.append(None)
    return Pieces(texts, _without(texts, tokens, special), raw)


def _mapped(token: str, byte_of: dict[int, int]) -> bytes:
    try:
        return token.translate(byte_of).encode("latin-1")
    except UnicodeEncodeError:
        # A token with a character outside the alphabet, such as an added one with a space, stands for itself.
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: printable Latin-1 for itself, the others from U+0100 on."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    themselves = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = sorted(c for c in alphabet if ord(c) >= 256)
    missing = (b for b in range(256) if b not in themselves.values())
    return themselves | dict(zip(others, missing, strict=True))


def _first_differs(tokens: Sequence[str | None], special: set[str], step: dict[str, Any]) -> Pieces:
    read = {"Join": _joined, "Metaspace": _metaspace, "WordPiece": _word_piece}[step["type"]]
    texts: list[str | None] = ["" if t is None else read(step, t, first=False) for t in tokens]
    return Pieces(
        texts,
        _without(texts, tokens, special),
        [(t or "").encode() for t in texts],
        first_text=lambda token_id: read(step, tokens[token_id] or "", first=True),
    )


def _joined(_: dict[str, Any], token: str, *, first: bool) -> str:
    return token if first else f" {token}"


def _metaspace(step: dict[str, Any], token: str, *, first: bool) -> str:
    return token.replace(step["replacement"], "" if first and step["prepend_scheme"] != "never" else " ")


def _word_piece(step: dict[str, Any], token: str, *, first: bool) -> str:
    if not first:
        token = token.replace(step["prefix"], "", 1) if token.startswith(step["prefix"]) else f" {token}"
    if step["cleanup"]:
        for old, new in _WORD_PIECE_CLEANUP:
            token = token.replace(old, new)
    return token


_WORD_PIECE_CLEANUP = (
    *((f" {mark}", mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def _replacing(tokens: Sequence[str | None], special: set[str], steps: Sequence[dict[str, Any]]) -> Pieces | None:
    """Any number of `Replace`, `ByteFallback`, `Fuse`, and a `Strip` of the beginning, in this order, the latter once at most."""
    order = {"Replace": 0, "ByteFallback": 1, "Fuse": 2, "Strip": 3}
    ranks = [order.get(step["type"], -1) for step in steps]
    if -1 in ranks or ranks != sorted(ranks) or any(ranks.count(rank) > 1 for rank in (1, 2, 3)):
        return None
    replaced: list[str | None] = list(tokens)
    strip = ("", 0)
    fused = 2 in ranks
    for step in steps:
        if step["type"] == "Replace":
            if "String" not in step["pattern"]:
                return None
            replaced = [t and t.replace(step["pattern"]["String"], step["content"]) for t in replaced]
        elif step["type"] == "Strip":
            if step["stop"] or not fused:
                return None
            strip = (step["content"], step["start"])
    if 1 not in ranks:
        raw = [(t or "").encode() for t in replaced]
        texts = [t or "" for t in replaced]
        return Pieces(texts, _without(texts, tokens, special), raw, strip=strip)
    are_bytes = [t is not None and _BYTE_TOKEN.fullmatch(t) is not None for t in replaced]
    with_runs = [None if is_byte else t or "" for t, is_byte in zip(replaced, are_bytes, strict=True)]
    raw = [
        bytes([int(t[3:5], 16)]) if is_byte and t else (t or "").encode() for t, is_byte in zip(replaced, are_bytes, strict=True)
    ]
    return Pieces(with_runs, _without(with_runs, tokens, special), raw, whole_runs=True, strip=strip)


def _agrees(tokenizer: Tokenizer, pieces: Pieces) -> bool:
    """Whether the tables decode some drawn ids as the library does: a decoder may change with its version."""
    from penstock.tokenizer.detokenizers import TableDetokenizer

    draw = random.Random(0)  # noqa: S311 - a sample, not a secret
    size = len(pieces.raw)
    odd = [i for i, text in enumerate(pieces.texts) if text is None]
    for count in range(1, 49):
        ids = [draw.choice(odd) if odd and draw.random() < 0.5 else draw.randrange(size) for _ in range(count)] if size else []
        for skip in (False, True):
            detokenizer = TableDetokenizer(pieces, skip_special_tokens=skip)
            text = "".join(map(detokenizer.feed, ids)) + detokenizer.finish()
            if text != tokenizer.decode(ids, skip_special_tokens=skip):
                return False
    return True
