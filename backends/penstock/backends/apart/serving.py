"""The process of an outside backend: it imports it, creates one model and computes what the executor asks, until it hangs up."""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np

from penstock.backends.apart.frames import RAISED, Arrays, Ended, read_device_config, receive, send
from penstock.backends.contract import GenerativeModel, KvChunk, ModelSpec, NativeKv, PrefixCopies, StepBatch, Tuned
from penstock.backends.discovery import Source
from penstock.backends.kv_abilities import native_kv, prefix_copies
from penstock.backends.reports import text_of, what_was_raised
from penstock.backends.validation import fault_of_kv
from penstock.common.service import StartError

__all__ = ["serve"]

_T = TypeVar("_T")

# Those whose text is for the operator, and says all.
_BY_TEXT = {"ModelLost", "StartError"}

Answer = tuple[dict[str, Any], Arrays]


def serve(connection: socket.socket, shared: int, life: int, source: Source, spec: ModelSpec) -> None:
    """Answer frames until the other side ends."""
    _end_with(life)
    # The executor's own signals reach its group: it says when this process is to end.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    rooms = _Rooms(shared, source, spec)
    try:
        while True:
            kind, facts, arrays = receive(connection)
            try:
                send(connection, "done", *rooms.calls[kind](facts, arrays))
            except Ended:
                raise
            except Exception as error:  # noqa: BLE001  whatever a backend raises, the executor is told
                send(connection, "raised", _told(error))
    except Ended:
        rooms.close()


def _told(error: Exception) -> dict[str, str]:
    kind = next((name for name, known in RAISED.items() if isinstance(error, known)), "")
    return {"kind": kind, "text": text_of(error) or kind if kind in _BY_TEXT else what_was_raised(error)}


def _end_with(pipe: int) -> None:
    """Have the kernel's SIGIO end this process when the pipe's other end closes, even if it hangs with the interpreter's lock."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    closed = select.poll()
    closed.register(pipe, 0)
    if closed.poll(0):  # before the kernel was asked
        os._exit(1)


class _Rooms:
    def __init__(self, shared: int, source: Source, spec: ModelSpec) -> None:
        self._source = source
        self._spec = spec
        self._memory = mmap.mmap(shared, 0)
        self._model: GenerativeModel | None = None
        self._native: NativeKv | None = None
        self._copies: PrefixCopies | None = None
        self.calls: dict[str, Callable[[dict[str, Any], Arrays], Answer]] = {
            "create": self._create,
            "step": self._step,
            "export_kv": self._export_kv,
            "import_kv": self._import_kv,
            "export_blocks": self._export_blocks,
            "import_blocks": self._import_blocks,
            "copy_prefix": self._copy_prefix,
        }

    def close(self) -> None:
        """Let the backend give back what it holds."""
        if self._model is not None:
            self._model.close()

    def _create(self, config: dict[str, Any], _: Arrays) -> Answer:
        model = self._model = self._source.registration().create(self._spec, read_device_config(config))
        if fault := fault_of_kv(model.kv):
            raise StartError(f"{self._source.name} made a model that is not what it said: {fault}")
        self._native, self._copies = native_kv(model), prefix_copies(model)
        ways = dict(model.ways) if isinstance(model, Tuned) else {}
        return {"kv": asdict(model.kv), "dtype": model.dtype, "device": model.device, "ways": ways}, {}

    def _step(self, _: dict[str, Any], arrays: Arrays) -> Answer:
        logits = self._open().step(StepBatch(**arrays)).logits
        rows, columns = len(arrays["logits_rows"]), self._spec.decoder.vocabulary_size
        if logits.shape != (rows, columns):
            raise ValueError(f"logits are {list(logits.shape)}, and {[rows, columns]} were asked for")
        np.frombuffer(self._memory, np.float32, rows * columns).reshape(rows, columns)[...] = logits
        return {}, {}

    def _export_kv(self, where: dict[str, Any], _: Arrays) -> Answer:
        return {}, {"data": self._open().export_kv(where["blocks"], range(*where["tokens"])).data}

    def _import_kv(self, where: dict[str, Any], arrays: Arrays) -> Answer:
        self._open().import_kv(where["blocks"], KvChunk(range(*where["tokens"]), arrays["data"]))
        return {}, {}

    def _export_blocks(self, where: dict[str, Any], _: Arrays) -> Answer:
        return {}, {"data": _there(self._native, "form of its own for blocks").export_blocks(where["blocks"])}

    def _import_blocks(self, where: dict[str, Any], arrays: Arrays) -> Answer:
        _there(self._native, "form of its own for blocks").import_blocks(where["blocks"], arrays["data"])
        return {}, {}

    def _copy_prefix(self, where: dict[str, Any], _: Arrays) -> Answer:
        return {"copied": _there(self._copies, "copies of prefixes").copy_prefix(where["source"], where["target"])}, {}

    def _open(self) -> GenerativeModel:
        return _there(self._model)


def _there(part: _T | None, what: str = "model") -> _T:
    if part is None:
        raise RuntimeError(f"there is no {what} here")
    return part
