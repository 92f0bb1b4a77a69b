"""Identity of a tokenizer: services that name the same fingerprint agree on every token id and on the chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["tokenizer_fingerprint"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def tokenizer_fingerprint(folder: Path) -> str:
    """Hash of the tokenizer's files in a checkpoint's folder: the names and the bytes of those that are there."""
    digest = hashlib.blake2b(digest_size=16)
    for name in _FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}:{len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()
