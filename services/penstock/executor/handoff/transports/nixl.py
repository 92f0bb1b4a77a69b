"""Payload by NVIDIA's NIXL: written into the receiving executor's memory over whatever UCX finds between the two.

That is RDMA between hosts that have it. Each end has an agent of its own for each link, so that nothing written late reaches a
newer link's memory, and closing a link ends all access to it. Payload is written before it is told of, from a buffer that is
registered once. Backends hand out KV in host memory, and that is what goes: NIXL's DRAM segments.

NIXL's own way to write descriptors down is pickle, which is used nowhere here: a payload's descriptor is two integers.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import importlib
import logging
import os
import secrets
import struct
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports.inline import check
from penstock.executor.handoff.transports.port import (
    DevicePayload,
    LinkClosed,
    Parcel,
    Payload,
    PayloadOutOfRange,
    PayloadUnproven,
    TransportFailed,
    checksum,
)
from penstock.executor.handoff.transports.window import Window

__all__ = ["NixlIncoming", "NixlOutgoing", "missing"]

_MEMORY = "DRAM"
_BACKEND = "UCX"
_PROOF_BYTES = 32
_HEADER_BYTES = 4096
_MOST_BYTES = 4 << 30
_PATIENCE_SECONDS = 10.0
_OFFER = struct.Struct("!QQ")  # where the memory begins, and how many bytes payload may take; the agent's metadata follow
_RANGE = struct.Struct("!QQ")  # offset, bytes


@functools.cache
def missing() -> str | None:
    """Why NIXL can not be used here; None: it can. The first agent of a process takes long to make, so one is made here."""
    try:
        importlib.import_module("nixl._api")
    except Exception as error:  # noqa: BLE001 - its wheels raise what the dynamic loader or CUDA's detection does
        return f"nixl can not be imported: {error}"
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it tells of every agent, on stdout
    try:
        _Registered(0).close()
    except TransportFailed as error:
        return str(error)
    return None


class _Registered:
    """Memory that an agent of its own lets others reach, or reaches others from."""

    def __init__(self, size: int) -> None:
        api = importlib.import_module("nixl._api")
        config = api.nixl_agent_config(backends=[_BACKEND], sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT)
        try:
            self.agent: Any = api.nixl_agent(f"penstock-{secrets.token_hex(16)}", config)
            self.memory: NDArray[np.uint8] = np.zeros(_HEADER_BYTES + size, np.uint8)
            self.begin = self.memory.ctypes.data
            self._regions = self.agent.register_memory([(self.begin, self.memory.nbytes, 0, "")], _MEMORY, [_BACKEND])
        except Exception as error:
            raise TransportFailed(f"NIXL: {error}") from error

    @property
    def metadata(self) -> bytes:
        """What another agent needs to reach this memory, and no other of this process."""
        return bytes(self.agent.get_partial_agent_metadata(self._regions, inc_conn_info=True, backends=[_BACKEND]))

    def close(self) -> None:
        """End all access to it, and let go of it."""
        self.agent.deregister_memory(self._regions, [_BACKEND])


@dataclass(frozen=True, slots=True)
class _Remote:
    """The receiving end's memory."""

    agent: str
    begin: int
    size: int


class NixlOutgoing:
    """The sending end."""

    transport = Transport.NIXL

    def __init__(self, offer: bytes) -> None:
        """Reach the receiving end's memory, and read its answer there. Blocks while the two connect.

        Raises:
            TransportFailed: it can not be reached.
        """
        if len(offer) <= _OFFER.size:
            raise TransportFailed("NIXL: the offer is cut short")
        begin, size = _OFFER.unpack_from(offer)
        if size > _MOST_BYTES:
            raise TransportFailed(f"NIXL: {size} bytes are offered, and this side mirrors {_MOST_BYTES} at most")
        self._closed = False
        self._local: _Registered | None = _Registered(size)
        try:
            agent = self._local.agent.add_remote_agent(offer[_OFFER.size :])
            self._remote = _Remote(agent.decode() if isinstance(agent, bytes) else agent, begin, size)
            self._move("READ", self._local, 0, _HEADER_BYTES)
        except TransportFailed:
            raise
        except Exception as error:
            raise TransportFailed(f"NIXL: {error}") from error
        self.answer = self._local.memory[:_PROOF_BYTES].tobytes()
        self._window = Window(size)

    async def put(self, data: memoryview) -> Parcel:
        """See `Outgoing`."""
        begin = await self._window.take(data.nbytes)
        if (local := self._local) is None:
            raise LinkClosed("the link was closed")
        writing = asyncio.get_running_loop().run_in_executor(None, self._write, local, begin, data)
        try:
            sum_ = await asyncio.shield(writing)
        except asyncio.CancelledError:
            writing.add_done_callback(lambda _: self._window.give(begin))
            raise
        except Exception as error:
            self._window.give(begin)
            raise TransportFailed(f"NIXL: {error}") from error
        parcel = Parcel(DevicePayload(_RANGE.pack(begin, data.nbytes)), sum_)
        self._window.hold(parcel.payload, begin)
        return parcel

    def taken(self, payload: Payload) -> None:
        """See `Outgoing`."""
        self._window.release(payload)

    def close(self) -> None:
        """See `Outgoing`."""
        self._closed = True
        self._window.close()
        self._local = None  # a thread that still writes sees that the link is closed, and lets go of the last of it

    def _write(self, local: _Registered, begin: int, data: memoryview) -> int:
        at = _HEADER_BYTES + begin
        np.copyto(local.memory[at : at + data.nbytes], np.frombuffer(data, np.uint8))
        self._move("WRITE", local, at, data.nbytes)
        return checksum(data)

    def _move(self, operation: str, local: _Registered, at: int, size: int) -> None:
        agent = local.agent
        here = agent.get_xfer_descs([(local.begin + at, size, 0)], _MEMORY)
        there = agent.get_xfer_descs([(self._remote.begin + at, size, 0)], _MEMORY)
        handle = agent.initialize_xfer(operation, here, there, self._remote.agent, backends=[_BACKEND])
        try:
            state, deadline = agent.transfer(handle), time.monotonic() + _PATIENCE_SECONDS
            while state == "PROC" and not self._closed and time.monotonic() < deadline:
                time.sleep(0.0001)
                state = agent.check_xfer_state(handle)
        finally:
            agent.release_xfer_handle(handle)
        if state != "DONE":
            raise TransportFailed(f"NIXL: {operation} of {size} bytes ended as {state}")


class NixlIncoming:
    """The receiving end: the memory's owner."""

    transport = Transport.NIXL

    def __init__(self, window_bytes: int) -> None:
        """Register memory for payload.

        Raises:
            TransportFailed: it can not be.
        """
        registered = _Registered(window_bytes)
        self._answer = secrets.token_bytes(_PROOF_BYTES)
        registered.memory[:_PROOF_BYTES] = np.frombuffer(self._answer, np.uint8)
        self.offer = _OFFER.pack(registered.begin, window_bytes) + registered.metadata
        self._registered: _Registered | None = registered
        self._window_bytes = window_bytes
        self._proven = False

    def prove(self, answer: bytes) -> bool:
        """Whether the other end has read this memory; from then on payload may come through it."""
        self._proven = self._proven or hmac.compare_digest(answer, self._answer)
        return self._proven

    async def open(self, payload: Payload, checksum: int) -> memoryview:
        """See `Incoming`."""
        if self._registered is None:
            raise LinkClosed("the link is closed")
        if not isinstance(payload, DevicePayload) or not self._proven:
            raise PayloadUnproven("NIXL was not proven on this stream")
        if len(payload.descriptor) != _RANGE.size:
            raise PayloadOutOfRange("a descriptor is two integers of 64 bits")
        offset, size = _RANGE.unpack(payload.descriptor)
        if size < 1 or offset + size > self._window_bytes:
            raise PayloadOutOfRange(f"bytes {offset} to {offset + size}: the window has 0 to {self._window_bytes}")
        view = self._registered.memory[_HEADER_BYTES + offset : _HEADER_BYTES + offset + size].data.toreadonly()
        await check(view, checksum)
        return view

    def close(self) -> None:
        """See `Incoming`."""
        if self._registered is not None:
            self._registered.close()
            self._registered = None
