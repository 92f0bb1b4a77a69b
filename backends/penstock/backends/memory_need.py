"""Whether a model fits into main memory, said before a byte of it is read, with what would fit."""

from __future__ import annotations

import math
from collections.abc import Mapping

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import Capabilities, DeviceConfig, DType
from penstock.common.service import StartError

__all__ = ["check_memory", "kv_bytes", "weight_bytes"]

# Bytes of a weight: whole ones, or two and one to a byte; scales come on top and are left out, so that this is a lower bound.
_WEIGHT: Mapping[DType, float] = {DType.F32: 4, DType.BF16: 2, DType.INT8: 1, DType.INT4: 0.5}
# Of an element of the cache, in the narrowest type that a backend keeps it in by default.
_KV: Mapping[DType, float] = {DType.F32: 4, DType.BF16: 2, DType.INT8: 2, DType.INT4: 2}
# A cache that holds less is of no use to anybody.
_LEAST_TOKENS = 256
_GIB = 1 << 30


def weight_bytes(decoder: DecoderSpec, capabilities: Capabilities, dtype: DType) -> int:
    """Memory that the weights take at least: as the backend says, else by their shapes. Vectors stay in 32 or 16 bits."""
    given = capabilities.weight_bytes.get(dtype)
    if given is not None:
        return given
    shapes = decoder.weight_shapes().values()
    return int(sum(math.prod(shape) * (_WEIGHT[dtype] if len(shape) > 1 else 2) for shape in shapes))


def kv_bytes(decoder: DecoderSpec, dtype: DType, tokens: int) -> int:
    """Memory that the keys and values of so many tokens take."""
    return int(2 * decoder.layers * decoder.kv_heads * decoder.head_dim * tokens * _KV[dtype])


def check_memory(name: str, decoder: DecoderSpec, capabilities: Capabilities, config: DeviceConfig, free: int) -> None:
    """Refuse what can not fit: the weights, and the cache that is asked for or the smallest that is of use.

    Args:
        name: of the backend.
        decoder: the model.
        capabilities: what the backend can do with it.
        config: what the operator asks; its dtype is set.
        free: bytes of main memory that may still be taken.

    Raises:
        StartError: it does not fit; names the flag to change, and what would fit.
    """
    dtype = config.dtype or capabilities.dtypes[0]
    least = min(_LEAST_TOKENS, config.max_context or decoder.context_length)

    def need(of: DType, cache: int | None) -> int:
        return weight_bytes(decoder, capabilities, of) + (kv_bytes(decoder, of, least) if cache is None else cache)

    asked = config.kv_cache_bytes
    if need(dtype, asked) <= free:
        return
    weights = weight_bytes(decoder, capabilities, dtype)
    remedies = [f"--dtype {other} ({_gib(need(other, None))})" for other in capabilities.dtypes if need(other, None) <= free]
    if asked is not None and need(dtype, None) <= free:
        # Two digits, rounded down: what is told fits.
        remedies = [f"--kv-cache-gib {math.floor((free - weights) / _GIB * 100) / 100:g} with {dtype}"]
    cache = f"a KV cache of {_gib(asked)}" if asked is not None else f"a KV cache of {least} tokens"
    would = (
        f"what would fit: {', '.join(remedies)}"
        if remedies
        else f"no dtype of this backend fits ({', '.join(capabilities.dtypes)})"
    )
    raise StartError(
        f"not enough memory: {name} needs {_gib(need(dtype, asked))} for weights in {dtype} ({_gib(weights)}) and {cache}, and "
        f"{_gib(free)} are free here; {would}"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
