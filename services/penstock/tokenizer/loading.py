"""Tokenizers from a checkpoint's folder: ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from penstock.common.fingerprint import tokenizer_fingerprint
from penstock.tokenizer.pieces import Pieces, pieces_of

__all__ = ["LoadError", "Vocabulary", "load"]

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class LoadError(Exception):
    """A folder's tokenizer can not be read; one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One model's tokenizer, as read.

    Attributes:
        tokenizer: the library's object.
        pieces: its tables for decoding; None where its decoder needs the library.
        fingerprint: identity over tokenizer and chat template.
        size: every id is below this.
        chat_template: its source; None where the checkpoint has none.
        special_tokens: text by name, such as ``bos_token``, for the chat template.
    """

    tokenizer: Tokenizer
    pieces: Pieces | None
    fingerprint: str
    size: int
    chat_template: str | None
    special_tokens: Mapping[str, str]


def load(folder: Path) -> Vocabulary:
    """Read a checkpoint's tokenizer.

    Raises:
        LoadError: a file is missing or is not what it should be.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise LoadError(f"{folder} holds no tokenizer.json; save one with transformers' AutoTokenizer.save_pretrained")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise LoadError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = _json(folder / "tokenizer_config.json")
    pieces = pieces_of(tokenizer)
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    special = _special_tokens(_json(folder / "special_tokens_map.json") | config)
    return Vocabulary(tokenizer, pieces, tokenizer_fingerprint(folder), size, _chat_template(folder, config), special)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise LoadError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path} is no JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A token stands there as its text or as an object with `content`."""
    texts = {name: value.get("content") if isinstance(value, dict) else value for name in _SPECIAL if (value := config.get(name))}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The template file wins over the configuration, where there may be one template or a list of named ones."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise LoadError(f"{folder}: chat_template is neither a text nor a list of named texts")
    return template
