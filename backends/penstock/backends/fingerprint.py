"""Identity of a checkpoint: what its configuration says, and every byte of its tensors, however they are sharded.

Bytes are read once: digests are kept by file, and hold as long as its size, its time and its place on disk are the same. They are a
file of JSON for each shard, in the folder ``digests`` of Penstock's cache; one that can not be used costs a reading of the shard.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from penstock.backends.safetensors import CheckpointError, TensorEntry
from penstock.common.whole_files import write_whole

__all__ = ["fingerprint"]

# Keys of config.json that tell who wrote it, not what it is.
_PROVENANCE = ("transformers_version", "_name_or_path")
_PIECE = 1 << 22
_LARGEST_FILE = 1 << 26


def fingerprint(config: Mapping[str, Any], entries: Mapping[str, TensorEntry], cache: Path | None = None) -> str:
    """The identity, 32 hexadecimal digits.

    Args:
        config: what config.json says.
        entries: where the tensors lie, by name.
        cache: folder in which digests of files are kept for the next time; None: nowhere.

    Raises:
        CheckpointError: a shard can not be read.
    """
    identity = hashlib.blake2b(digest_size=16)
    said = {key: value for key, value in config.items() if key not in _PROVENANCE}
    identity.update(json.dumps(said, sort_keys=True).encode())
    digests: dict[str, str] = {}
    for shard in {entry.shard for entry in entries.values()}:
        digests |= _digests(shard, {name: entry for name, entry in entries.items() if entry.shard == shard}, cache)
    for name, entry in sorted(entries.items()):
        identity.update(f"{name}:{entry.dtype}:{entry.shape}:{digests[name]}".encode())
    return identity.hexdigest()


def _digests(shard: Path, entries: Mapping[str, TensorEntry], cache: Path | None) -> dict[str, str]:
    """Of each tensor of a shard, XXH3's of 128 bits."""
    try:
        with shard.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
            place = hashlib.blake2b(bytes(shard.resolve()), digest_size=16).hexdigest()
            kept = cache and cache / "digests" / f"{place}.json"
            found = _read(kept, state, entries) if kept else None
            if found is None:
                found = {name: _digest(file.fileno(), entry) for name, entry in entries.items()}
                if kept:
                    _keep(kept, state, found)
            return found
    except OSError as error:
        raise CheckpointError(f"{shard}: can not be read: {error.strerror}") from error


def _digest(file: int, entry: TensorEntry) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(_PIECE, entry.end - entry.begin)))
    place = entry.begin
    while place < entry.end:
        count = os.preadv(file, [buffer[: entry.end - place]], place)
        if not count:
            raise CheckpointError(f"{entry.shard}: ends before its tensors do; fetch the checkpoint again")
        digest.update(buffer[:count])
        place += count
    return digest.hexdigest()


def _read(kept: Path, state: list[int], names: Iterable[str]) -> dict[str, str] | None:
    """What was kept of a file in this state; None where that is nothing."""
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if kept.stat().st_size <= _LARGEST_FILE:
            content = json.loads(kept.read_bytes())
            if content["state"] == state:
                return {name: str(content["digests"][name]) for name in names}
    return None


def _keep(kept: Path, state: list[int], digests: Mapping[str, str]) -> None:
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"state": state, "digests": digests}).encode())
