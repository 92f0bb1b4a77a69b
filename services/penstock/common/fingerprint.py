"""Identity of a checkpoint's tokenizer: the tokenizer service and the executors tell it, and only equals are placed together."""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["tokenizer_fingerprint"]

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "chat_template.json")


def tokenizer_fingerprint(folder: Path) -> str:
    """BLAKE2b, as hex, over the files of a checkpoint that decide how text becomes ids and back, its chat template included.

    Files that the checkpoint lacks count as absent, so a folder without any tokenizer has a fingerprint too.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in _FILES:
        path = folder / name
        if path.is_file():
            content = path.read_bytes()
            digest.update(f"{name}:{len(content)}:".encode())
            digest.update(content)
    return digest.hexdigest()
