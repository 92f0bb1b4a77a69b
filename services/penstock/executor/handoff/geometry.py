"""How many bytes KV takes, and what a Push has to be before anything of it is read."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.backends.contract import CANONICAL_DTYPES, KvSpec
from penstock.executor.handoff.transports.port import InlinePayload, Payload, SharedPayload
from penstock.executor.handoff.words import Push, Refusal

__all__ = ["Fault", "Geometry"]

Fault = tuple[Refusal, str]


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of a model's KV on this executor."""

    kv: KvSpec
    vocabulary_size: int

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.kv.block_size

    def agrees(self, native_layout: str) -> bool:
        """Whether blocks of that layout are blocks of this one."""
        return bool(self.kv.native_layout) and native_layout == self.kv.native_layout

    def size(self, tokens: int, *, native: bool, dtype: str | None = None) -> int:
        """Bytes of KV of so many tokens, from a block's begin on where the form is native.

        `dtype` is one of `CANONICAL_DTYPES`; None: that of this executor's exports.
        """
        if native:
            return -(-tokens // self.kv.block_size) * self.kv.bytes_per_block
        return self.kv.canonical_bytes(tokens, dtype or self.kv.canonical_dtype)

    def uncut(self, *, native: bool) -> int:
        """Bytes that may have to go in one piece: of a token, or where the form is native of a block.

        The end of a block whose begin is there already is canonical, on a native stream too.
        """
        tokens = self.block_size if native else 1
        canonical = max(self.kv.canonical_bytes(tokens, dtype) for dtype in CANONICAL_DTYPES)
        return max(canonical, self.kv.bytes_per_block) if native else canonical

    def cut(self, push_bytes: int, window_bytes: int, *, native: bool) -> tuple[int, int]:
        """How many tokens go together, and how many a push of so many bytes holds: whole blocks, one at least.

        Where a whole block is more than the window, the canonical form goes token by token. The native one can not: there the
        window holds a block.
        """
        push_bytes, block = min(push_bytes, window_bytes), self.size(self.block_size, native=native)
        if native or block <= window_bytes:
            return self.block_size, max(1, push_bytes // block) * self.block_size
        return 1, max(1, push_bytes // self.size(1, native=False))

    def fault(self, push: Push, end: int, *, native_agreed: bool) -> Fault | None:
        """What is wrong with a push's form, where `end` tokens are wanted in all."""
        tokens = push.tokens
        if push.native:
            if not native_agreed:
                return Refusal.WRONG_DTYPE, "the native form was not agreed on"
            if tokens.start % self.block_size or (tokens.stop % self.block_size and tokens.stop != end):
                return Refusal.OUT_OF_RANGE, f"tokens {tokens.start} to {tokens.stop} are not whole blocks of {self.block_size}"
        elif push.dtype not in CANONICAL_DTYPES:
            return Refusal.WRONG_DTYPE, f"dtype {push.dtype[:32]!r} is none of {', '.join(CANONICAL_DTYPES)}"
        return self.wrong_size(push, _declared(push.parcel.payload))

    def wrong_size(self, push: Push, size: int | None) -> Fault | None:
        """Whether a payload has another size than its tokens need; None: not known before it is fetched."""
        needed = self.size(len(push.tokens), native=push.native, dtype=push.dtype)
        if size is None or size == needed:
            return None
        return Refusal.WRONG_SIZE, f"{size} bytes where {len(push.tokens)} tokens take {needed}"


def _declared(payload: Payload) -> int | None:
    if isinstance(payload, InlinePayload):
        return memoryview(payload.data).nbytes
    return payload.bytes if isinstance(payload, SharedPayload) else None
