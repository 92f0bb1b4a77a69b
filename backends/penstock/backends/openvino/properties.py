"""How the plug-in is set up for each dtype, and why.

- ``INFERENCE_PRECISION_HINT`` and ``KV_CACHE_PRECISION``: float32 for ``f32``, so that its tokens are those of the formulas;
  bfloat16 otherwise, where the processor multiplies it. Where it does not, shorter weights have a cache in float16: half of what
  float32 takes and attention reads, and nearer to it than bfloat16. The cache has 8 bits where the operator asks for that.
- ``KEY_CACHE_QUANT_MODE``: the plug-in's own default for keys of 8 bits scales them by channel, and a block anew with each token
  that enters it: a sequence's keys would then depend on how its prompt was cut into chunks. Here each token has its own scale.
- ``DYNAMIC_QUANTIZATION_GROUP_SIZE``: with weights of 8 or 4 bits the inputs of a product are rounded to int8 as well, in groups
  that share a scale. The default of 32 spends much of a product on applying scales; a group is as long here as the model's
  dimensions allow, up to 128.
- ``ENABLE_CPU_PINNING`` off: threads that are pinned by their number land on cores that belong to another container, or all
  executors of a machine on the same ones, and one that other services hold up can not move. It gains nothing where weights lie in
  huge pages.
- ``TBB_PARTITIONER``: work on weights that are rounded, or widened as they are multiplied, is dealt out as threads become free, for
  the other services run on the same cores; dealing it out evenly beforehand leaves one thread waiting for the other. The rest keeps
  the plug-in's own, which deals evenly: those steps wait for memory. Releases that do not know the property go without.
- ``NUM_STREAMS`` 1 and ``PERFORMANCE_HINT`` latency: one step at a time uses all threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DType
from penstock.backends.openvino.quantization import group_size

__all__ = ["OPTIONAL", "properties"]

OPTIONAL = frozenset({"TBB_PARTITIONER"})
"""Properties that change speed alone, and that not every release knows."""

_SHORTEST_GROUP = 32


def properties(
    decoder: DecoderSpec, dtype: DType, threads: int, *, has_bf16: bool, kv_cache: DType | None = None
) -> Mapping[str, Any]:
    """Properties to compile a decoder's graph with.

    Args:
        decoder: the model.
        dtype: of its weights.
        threads: how many compute.
        has_bf16: whether the processor multiplies bfloat16.
        kv_cache: INT8, or None for the type that goes with these weights here.
    """
    compute = "bf16" if has_bf16 and dtype is not DType.F32 else "f32"
    widens = compute == "f32" and dtype is not DType.F32
    chosen = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": compute,
        "KV_CACHE_PRECISION": "f16" if widens else compute,
    }
    if kv_cache is DType.INT8:
        chosen |= {"KV_CACHE_PRECISION": "u8", "KEY_CACHE_QUANT_MODE": "BY_TOKEN"}
    if dtype.quantised or widens:
        chosen["TBB_PARTITIONER"] = "AUTO"
    if dtype.quantised:
        chosen["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _group_size(decoder)
    return chosen


def _group_size(decoder: DecoderSpec) -> int:
    """The longest group that every product's inputs divide into; the shortest where none does."""
    return group_size(decoder.hidden_size, decoder.intermediate_size, decoder.heads * decoder.head_dim) or _SHORTEST_GROUP
