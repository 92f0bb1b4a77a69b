"""The two executors of `handoff.py`: everything of a handoff is real but the engine, whose KV is one array in memory."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

import measuring  # noqa: F401 - before gRPC, for what it sets
from penstock.backends.contract import KvSpec
from penstock.common.server import GrpcServer
from penstock.executor.handoff.exchange import Exchange
from penstock.executor.handoff.framing import serve_stream
from penstock.executor.handoff.handoffs import Settings
from penstock.executor.handoff.identity import Identity
from penstock.executor.handoff.peers import Peer
from penstock.executor.handoff.servicer import HandoffServicer
from penstock.executor.handoff.ticket import Receive, Send, Ticket, Transport
from penstock.executor.sequence import SequenceRequest

__all__ = ["DECODE", "SECRET", "End", "Handle", "kv_spec", "receive"]

DECODE = "decode"
SECRET = bytes(32)  # both processes know it: there is no scheduler between them
_MODEL = "a fingerprint"
# Qwen3-0.6B's KV in bfloat16: 112 KiB a token.
_LAYERS, _HEADS, _DIM, _BLOCK = 28, 8, 128, 32


def kv_spec(blocks: int) -> KvSpec:
    """A cache of so many blocks of 32 tokens, 3.5 MiB each."""
    return KvSpec(
        block_size=_BLOCK,
        blocks=blocks,
        bytes_per_block=_LAYERS * 2 * _BLOCK * _HEADS * _DIM * 2,
        layout="canonical",
        dtype="bfloat16",
        token_shape=(_LAYERS, _HEADS, _DIM),
        canonical_dtype="bfloat16",
        native_layout="an array",
    )


@dataclass(eq=False, slots=True)
class Handle:
    """A sequence; its KV is all that the engine has."""

    request: SequenceRequest


class _Engine:
    """`KvEngine` over one array. Exports are views of it; imports are copied into it, in a thread of its own."""

    def __init__(self, kv: KvSpec) -> None:
        self.kv = kv
        self.memory = np.zeros((kv.blocks, kv.bytes_per_block), np.uint8)
        self.memory[:] = np.frombuffer(np.random.default_rng(7).bytes(kv.bytes_per_block), np.uint8)
        self.events: Any = None
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "engine")

    @property
    def handoff(self) -> _Engine:
        """The part of an engine that is a `KvEngine`: here all of it."""
        return self

    def _blocks(self, tokens: range) -> slice:
        return slice(tokens.start // self.kv.block_size, -(-tokens.stop // self.kv.block_size))

    def export_kv(self, handle: Handle, tokens: range, *, native: bool, done: Any, wanted: Any = None) -> None:  # noqa: ARG002 - there is one form, and all of it goes
        self._thread.submit(done, self.memory[self._blocks(tokens)])

    def import_kv(self, handle: Handle, tokens: range, data: Any, *, native: bool, done: Any) -> None:  # noqa: ARG002 - the same
        def copy() -> None:
            np.copyto(self.memory[self._blocks(tokens)], data)
            done(None)

        self._thread.submit(copy)

    def begin_decode(self, handle: Handle, first_token: int, arrival: Any) -> None:  # noqa: ARG002 - nothing is decoded
        self._loop.call_soon_threadsafe(self._end, arrival.transport.value)
        self.events.ended(handle)

    def handed_off(self, handle: Handle) -> None:
        self._loop.call_soon_threadsafe(self._end, "handed off")
        self.events.ended(handle)

    def leave(self, handle: Handle) -> None:
        self._loop.call_soon_threadsafe(self._end, "left")
        self.events.ended(handle)

    def fail(self, handle: Handle, failure: Any, message: str) -> None:
        self._loop.call_soon_threadsafe(self._end, f"{failure.value}: {message}")
        self.events.ended(handle)

    def _end(self, how: str) -> None:
        if not self.ended.done():
            self.ended.set_result(how)


class End:
    """An executor's handoffs, without the executor."""

    def __init__(self, executor_id: str, blocks: int, transports: Sequence[Transport], window_bytes: int, push_bytes: int) -> None:
        kv = kv_spec(blocks)
        self.engine = _Engine(kv)
        identity = Identity(executor_id, _MODEL, kv.native_layout, SECRET)
        settings = Settings(30.0, push_bytes, window_bytes, tuple(transports))
        self.exchange = Exchange(identity, self.engine, kv, 1000, settings)  # type: ignore[arg-type] # what it uses of one
        self._tokens = blocks * kv.block_size

    async def hand_over(self, ticket: Ticket) -> str:
        """Send all KV, which is there already, and the first token: how it ended."""
        self.engine.ended = asyncio.get_running_loop().create_future()
        handle = Handle(SequenceRequest(sequence_id=1, prompt=(), max_tokens=2, handoff=Send(ticket)))
        self.exchange.handoffs.begun(handle)  # type: ignore[arg-type] # a Handle by its fields
        self.exchange.handoffs.computed(handle, self._tokens)  # type: ignore[arg-type] # the same
        self.exchange.handoffs.drawn(handle, 1)  # type: ignore[arg-type] # the same
        return await self.engine.ended

    def reserve(self, prefill_executor_id: str) -> Ticket:
        """A ticket for a sequence of the whole array."""
        request = SequenceRequest(sequence_id=1, prompt=(), max_tokens=2, handoff=Receive(prefill_executor_id))
        return self.exchange.handoffs.reserved(Handle(request), 0, self._tokens)  # type: ignore[arg-type] # the same


async def receive(blocks: int, prefill_executor_ids: Sequence[str], window_bytes: int, push_bytes: int) -> None:
    """The decode executor's process: a ticket for each line that names a prefill executor, ``prefill-`` and its transport."""
    transports = [Transport(executor_id.removeprefix("prefill-")) for executor_id in prefill_executor_ids]
    end = End(DECODE, blocks, transports, window_bytes, push_bytes)
    end.exchange.peers.update(Peer(executor_id, "127.0.0.1:1", _MODEL) for executor_id in prefill_executor_ids)
    server, servicer = GrpcServer(), HandoffServicer()
    servicer.serve(end.exchange.door)
    address = server.listen("127.0.0.1:0")
    server.add(serve_stream, servicer, "penstock.internal.v1.HandoffService")
    await server.start()
    print(address, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        ticket = end.reserve(line.strip())
        print(json.dumps({"handoff_id": ticket.handoff_id.hex(), "tokens": ticket.tokens}), flush=True)
    await end.exchange.close()
    await server.stop(0)
