"""Attention over a paged cache as two Triton kernels: blocks are read where they lie, and a long past is read by several programs.

The first kernel computes softmax attention over a part of the tokens in one pass (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018; Dao et al., "FlashAttention", 2022) and leaves each part's maximum and sum; the second joins the
parts (Dao et al., "Flash-Decoding", 2023). A program has the queries of one KV head: `GROUP` heads share it, and stand as rows
beside the tokens.

Compiled by Triton for NVIDIA's and AMD's devices; with TRITON_INTERPRET=1 the same source runs on the processor.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_part", "join_parts"]


# Sizes that differ from step to step: compiled once for all of them.
_VARYING = ("table", "last_seen", "tokens", "parts", "part_size", "table_stride", "last_stride")


@triton.jit(do_not_specialize=_VARYING)  # type: ignore[untyped-decorator]
def attend_part(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    last_seen: tl.tensor,
    out: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    part_size: tl.tensor,
    scale: tl.tensor,
    query_sequence: tl.tensor,
    query_token: tl.tensor,
    query_head: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    table_stride: tl.tensor,
    last_stride: tl.tensor,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One part of the tokens that a tile of `ROWS` queries of one sequence and KV head sees.

    Args:
        queries: [sequences, tokens, heads, DIM] by the strides `query_sequence`, `query_token` and `query_head`.
        keys: [blocks, BLOCK, KV heads, DIM] by the strides `block_`, `slot_` and `head_stride`.
        values: the same.
        table: int64 [sequences, blocks read], by `table_stride`.
        last_seen: int64 [sequences], by `last_stride`: the token that a sequence's first query sees last, counted from the first
            block's beginning; each query behind it sees one more.
        out: [sequences, tokens, heads, parts, DIM], weighted values; float32 and not yet divided, unless `WHOLE`.
        sums: float32 [sequences, tokens, heads, parts], of the exponentials; not used where `WHOLE`.
        maxima: the same, of the scores in base 2.
        tokens: of a sequence.
        parts: how many parts there are.
        part_size: tokens of a part, a multiple of `STEP`.
        scale: of the scores, times log2(e).
        query_sequence: elements from one sequence's queries to the next one's; the other strides likewise.
        query_token: of `queries`.
        query_head: of `queries`.
        block_stride: of `keys` and `values`.
        slot_stride: of `keys` and `values`, from token to token of a block.
        head_stride: of `keys` and `values`.
        table_stride: of `table`.
        last_stride: of `last_seen`.
        GROUP: heads that share a KV head.
        GROUP_ROWS: the next power of two.
        ROWS: of a tile, a power of two of at least 16.
        STEP: tokens that are read at a time, a power of two of at least 16.
        DIM: of a head.
        DIM_COLUMNS: the next power of two.
        BLOCK: tokens of a block.
        WINDOW: tokens that a query sees, itself among them; 0: all before it.
        WHOLE: whether there is but one part, which leaves the answer itself.
    """
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    sequence, part = tl.program_id(2) // parts, tl.program_id(2) % parts
    rows = tl.arange(0, ROWS)
    token = tile * (ROWS // GROUP_ROWS) + rows // GROUP_ROWS
    head = kv_head * GROUP + rows % GROUP_ROWS
    there = (token < tokens) & (rows % GROUP_ROWS < GROUP)
    columns = tl.arange(0, DIM_COLUMNS)
    inside = columns < DIM
    first = tl.load(last_seen + sequence * last_stride)
    last = first + token

    where = sequence.to(tl.int64) * query_sequence + token.to(tl.int64)[:, None] * query_token + head[:, None] * query_head
    query = tl.load(queries + where + columns[None], mask=there[:, None] & inside[None], other=0.0)

    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS, DIM_COLUMNS], tl.float32)
    begin = part * part_size
    # The last query of the tile sees most, the first one furthest back.
    end = tl.minimum(begin + part_size, first + tl.minimum((tile + 1) * (ROWS // GROUP_ROWS), tokens))
    if WINDOW > 0:
        oldest = tl.maximum(first + tile * (ROWS // GROUP_ROWS) - WINDOW + 1, 0)
        begin = tl.maximum(begin, oldest // STEP * STEP)
    for start in range(begin, end, STEP):
        place = start + tl.arange(0, STEP)
        read = place < end
        block = tl.load(table + sequence * table_stride + place // BLOCK, mask=read, other=0)
        slot = block * block_stride + (place % BLOCK) * slot_stride + kv_head * head_stride
        found = read[:, None] & inside[None]
        key = tl.load(keys + slot[:, None] + columns[None], mask=found, other=0.0)
        value = tl.load(values + slot[:, None] + columns[None], mask=found, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        seen = (place[None] <= last[:, None]) & read[None]
        if WINDOW > 0:
            seen = seen & (place[None] > last[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet has no maximum to take away.
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        likely = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(likely, 1)
        weighted = weighted * shrink[:, None] + tl.dot(likely.to(value.dtype), value, input_precision="ieee")
        maximum = larger

    heads = tl.num_programs(1) * GROUP
    row = ((sequence.to(tl.int64) * tokens + token) * heads + head) * parts + part
    if WHOLE:
        weighted = weighted / tl.where(there, total, 1.0)[:, None]
    else:
        tl.store(sums + row, total, mask=there)
        tl.store(maxima + row, maximum, mask=there)
    place = row[:, None] * DIM + columns[None]
    tl.store(out + place, weighted.to(out.dtype.element_ty), mask=there[:, None] & inside[None])


@triton.jit(do_not_specialize=("parts",))  # type: ignore[untyped-decorator]
def join_parts(
    partial: tl.tensor,
    sums: tl.tensor,
    maxima: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    DIM: tl.constexpr,
    DIM_COLUMNS: tl.constexpr,
    PART_ROWS: tl.constexpr,
) -> None:
    """What the parts of a query come to.

    Args:
        partial: float32 [queries, parts, DIM], as `attend_part` leaves it.
        sums: float32 [queries, parts].
        maxima: float32 [queries, parts]; a part that the query sees nothing of has -inf.
        out: [queries, DIM].
        parts: how many parts there are.
        DIM: of a head.
        DIM_COLUMNS: the next power of two.
        PART_ROWS: a power of two that is not below `parts`.
    """
    row = tl.program_id(0).to(tl.int64)
    part, columns = tl.arange(0, PART_ROWS), tl.arange(0, DIM_COLUMNS)
    there, inside = part < parts, columns < DIM
    maximum = tl.load(maxima + row * parts + part, mask=there, other=float("-inf"))
    weight = tl.exp2(maximum - tl.max(maximum, 0))
    total = tl.sum(tl.load(sums + row * parts + part, mask=there, other=0.0) * weight, 0)
    place = (row * parts + part)[:, None] * DIM + columns[None]
    found = tl.load(partial + place, mask=there[:, None] & inside[None], other=0.0)
    joined = tl.sum(found * weight[:, None], 0) / total
    tl.store(out + row * DIM + columns, joined.to(out.dtype.element_ty), mask=inside)
