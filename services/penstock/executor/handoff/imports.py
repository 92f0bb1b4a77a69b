"""KV on its way into the engine: fetched and checked by the transport, then written into blocks between two steps."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import CANONICAL_DTYPES
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.ports import KvEngine
from penstock.executor.handoff.receiver import Receiver
from penstock.executor.handoff.receiver_states import IncomingChunk
from penstock.executor.handoff.transports.port import (
    LinkClosed,
    PayloadOutOfRange,
    PayloadRefused,
    PayloadUnproven,
    TransportFailed,
)
from penstock.executor.handoff.words import Push, Refusal

__all__ = ["Imports"]


class Imports:
    """Of one event loop."""

    def __init__(self, engine: KvEngine, geometry: Geometry) -> None:
        self._engine = engine
        self._geometry = geometry
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, receiver: Receiver, chunk: IncomingChunk) -> None:
        """See `ReceiverPorts`."""
        task = self._loop.create_task(self._check(receiver, chunk))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self, receiver: Receiver, chunk: IncomingChunk) -> None:
        parcel = chunk.push.parcel
        try:
            data = await chunk.source.incoming.open(parcel.payload, parcel.checksum)
        except LinkClosed:
            return  # the receiver hears that the stream is lost
        except PayloadOutOfRange as error:
            receiver.unreadable(chunk, (Refusal.OUT_OF_RANGE, str(error)))
        except PayloadUnproven as error:
            receiver.unreadable(chunk, (Refusal.UNPROVEN, str(error)))
        except (PayloadRefused, TransportFailed) as error:
            receiver.unreadable(chunk, (Refusal.WRONG_CHECKSUM, str(error)))
        else:
            receiver.checked(chunk, data)

    def write(self, receiver: Receiver, chunk: IncomingChunk, data: memoryview) -> None:
        """See `ReceiverPorts`. From where the transport has it, without a copy."""
        push = chunk.push
        transport = chunk.source.incoming.transport

        def told(error: Exception | None) -> None:
            if error is None:
                receiver.imported(chunk, transport, self._loop.time())
            else:
                receiver.import_failed(chunk, str(error))

        def done(error: Exception | None) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(told, error)

        self._engine.import_kv(receiver.handle, push.tokens, self._array(push, data), native=push.native, done=done)

    def _array(self, push: Push, data: memoryview) -> NDArray[Any]:
        flat = np.frombuffer(data, np.uint8)
        if push.native:
            return flat.reshape(-1, self._geometry.kv.bytes_per_block)
        return flat.view(CANONICAL_DTYPES[push.dtype]).reshape(self._geometry.kv.canonical_shape(len(push.tokens)))

    def close(self) -> None:
        """Nothing is checked any more."""
        for task in self._tasks:
            task.cancel()
