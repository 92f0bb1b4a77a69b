"""How large a cache of KV blocks may be: from what the operator says, or from the memory that is there."""

from __future__ import annotations

from pathlib import Path

import psutil

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DeviceConfig
from penstock.common.service import StartError

__all__ = ["count_blocks", "free_memory"]

_CGROUP = Path("/sys/fs/cgroup")


def count_blocks(decoder: DecoderSpec, config: DeviceConfig, block_size: int, bytes_per_block: int, free: int) -> int:
    """Blocks to allocate: never more than the largest batch of the longest contexts fills, unless the operator says so.

    Args:
        decoder: the model.
        config: what the operator asks.
        block_size: tokens of a block.
        bytes_per_block: keys and values of all layers.
        free: bytes of the device's memory that nothing holds.

    Raises:
        StartError: not even one block fits.
    """
    context = min(config.max_context or decoder.context_length, decoder.context_length)
    fillable = config.max_batch_size * -(-context // block_size)
    if config.kv_cache_bytes is not None:
        blocks = config.kv_cache_bytes // bytes_per_block
    else:
        blocks = min(fillable, int(free * config.kv_cache_share) // bytes_per_block)
    if blocks < 1:
        budget = config.kv_cache_bytes if config.kv_cache_bytes is not None else int(free * config.kv_cache_share)
        raise StartError(f"{budget} bytes hold no KV block of {bytes_per_block} bytes; give the KV cache more memory")
    return blocks


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Bytes of main memory that may still be taken, within the limit of the container that this process runs in."""
    free = psutil.virtual_memory().available
    try:
        limit = int((cgroup / "memory.max").read_text(encoding="ascii"))
        used = int((cgroup / "memory.current").read_text(encoding="ascii"))
        reclaimable = next(
            int(line.split()[1])
            for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith("inactive_file ")
        )
    except (OSError, ValueError, StopIteration):  # no container, one of cgroup v1, or without a limit ("max")
        return free
    return max(0, min(free, limit - used + reclaimable))
