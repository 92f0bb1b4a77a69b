"""The C library keeps memory that is taken and freed again and again, instead of giving it back in between.

Each of gRPC's copies of a message, each piece that is copied out of a cache, and each intermediate result of a step in PyTorch is
fresh memory. glibc gives pieces of this size back to the system when they are freed, and the next one pays for every page anew:
half of the processor time of KV over gRPC, and a twentieth of a step in bfloat16.
"""

from __future__ import annotations

import ctypes
import functools
import os

__all__ = ["keep_freed_memory"]

# Of glibc's malloc.h. Both take bytes; the threshold of mmap can be no higher than this.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD = 32 << 20
# What is under way of KV in one direction, in all of its copies. Pieces beyond the threshold of mmap go back as ever: those of long
# steps of large models.
_TRIM_THRESHOLD = 128 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Keep up to 128 MiB that is free; False where the C library is another one, or the operator has decided by GLIBC_TUNABLES."""
    if "glibc.malloc.mmap_threshold" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD))
