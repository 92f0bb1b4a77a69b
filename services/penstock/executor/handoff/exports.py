"""KV on its way out of the engine: copied between two steps, then put where the other side can reach it."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ports import KvEngine, SequenceEnded
from penstock.executor.handoff.sender import Sender
from penstock.executor.handoff.sender_states import OutgoingChunk
from penstock.executor.handoff.transports.port import LinkClosed, Outgoing

__all__ = ["fetch"]


async def fetch(engine: KvEngine, sender: Sender, chunk: OutgoingChunk, outgoing: Outgoing) -> None:
    """Bring a chunk out, and tell its sender."""
    try:
        data = await _exported(engine, sender, chunk)
        chunk.parcel = await outgoing.put(await _flat(data))
    except (SequenceEnded, LinkClosed):
        return  # the sender hears of it by itself, and drops the chunk
    except Exception as error:  # noqa: BLE001 - whatever a backend or a transport says, the KV does not go
        sender.export_failed(chunk, HandoffFailure.BACKEND, f"{type(error).__name__}: {error}")
    else:
        sender.exported(chunk, asyncio.get_running_loop().time())


def _exported(engine: KvEngine, sender: Sender, chunk: OutgoingChunk) -> asyncio.Future[NDArray[Any]]:
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[NDArray[Any]] = loop.create_future()

    def settle(data: NDArray[Any] | Exception) -> None:
        if answer.done():
            return
        if isinstance(data, Exception):
            answer.set_exception(data)
        else:
            answer.set_result(data)

    def done(data: NDArray[Any] | Exception) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, data)

    engine.export_kv(sender.handle, chunk.tokens, native=chunk.native, done=done, wanted=lambda: not answer.cancelled())
    return answer


async def _flat(data: NDArray[Any]) -> memoryview:
    """Its bytes, in a row; copied only where they do not lie so."""
    if not data.flags.c_contiguous:
        data = await asyncio.to_thread(np.ascontiguousarray, data)
    return data.reshape(-1).view(np.uint8).data
