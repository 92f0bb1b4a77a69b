"""Identity of KV blocks: chained hashes over a prompt's full blocks, salted, so that equal hashes mean equal prefixes.

The gateway computes them for placement and the executor for its prefix cache; both call this.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

__all__ = ["WIRE_BYTES", "block_hashes", "next_block_hash", "tenant_salt", "wire_form"]

# Leading bytes of a hash that stand for it in messages between services. Placement bears a collision; the cache uses all bytes.
WIRE_BYTES = 8

_DIGEST_BYTES = 16


def next_block_hash(parent: bytes, ids: Sequence[int]) -> bytes:
    """Hash of a full block of token ids behind the block (or the salt) whose hash is `parent`."""
    return hashlib.blake2b(array("I", ids).tobytes(), digest_size=_DIGEST_BYTES, key=parent[:64]).digest()


def block_hashes(ids: Sequence[int], block_size: int, salt: bytes) -> list[bytes]:
    """Hashes of every full block of `ids`, each over all that stands before it. `salt` is at most 64 bytes."""
    hashes: list[bytes] = []
    parent = salt
    for start in range(0, len(ids) - block_size + 1, block_size):
        parent = next_block_hash(parent, ids[start : start + block_size])
        hashes.append(parent)
    return hashes


def wire_form(hashes: Sequence[bytes]) -> bytes:
    """The hashes as `Placing.block_hashes` and `KvEvents` hold them."""
    return b"".join(h[:WIRE_BYTES] for h in hashes)


def tenant_salt(tenant: str, cache_salt: str) -> bytes:
    """The salt under which a request shares cached blocks: with the same tenant and the same client-given salt alone."""
    return hashlib.blake2b(f"{len(tenant)}:{tenant}{cache_salt}".encode(), digest_size=_DIGEST_BYTES).digest()
