"""A model in a process of its own, as the executor uses it: a call is a frame there and one back; logits lie in shared memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from penstock.backends.apart.frames import RAISED, Arrays, Ended, receive, send, write_device_config
from penstock.backends.contract import (
    Availability,
    Capabilities,
    DeviceConfig,
    DType,
    KvChunk,
    KvSpec,
    ModelLost,
    ModelSpec,
    Registration,
    StepBatch,
    StepOutput,
    Unsupported,
)
from penstock.backends.inspection import BackendReport, manner_of_death
from penstock.backends.kv_blocks import check_chunk, check_copy, check_native, check_transfer
from penstock.common.service import StartError

__all__ = ["ModelApart", "registration_apart"]

_FIELDS = tuple(field.name for field in fields(StepBatch))
_ENDING_SECONDS = 10.0
# Unbuffered, so that what a backend prints is read when it says it, and not lost if it dies.
_COMMAND = (sys.executable, "-u", "-P", "-m", "penstock.backends.apart")


class ModelApart:
    """A `GenerativeModel` whose backend runs in a child process.

    Raises:
        StartError: the backend refused, raised or died; says which.
    """

    def __init__(self, name: str, spec: ModelSpec, config: DeviceConfig) -> None:
        self._name = name
        self._spec = spec
        self._doing = "import"
        self._lock = threading.Lock()
        # As large as the largest step's logits; what no step has written to takes no memory.
        size = max(1, config.max_batch_tokens) * spec.decoder.vocabulary_size * 4
        self._ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as kept, theirs:
            kept.enter_context(self._ours)
            with _memory_file(size) as shared:
                self._memory = kept.enter_context(mmap.mmap(shared.fileno(), size))
                # Its other end ends with this process, however that dies, and the child with it.
                life, self._life = os.pipe()
                kept.callback(os.close, self._life)
                try:
                    self._process = self._spawn((theirs.fileno(), shared.fileno(), life))
                finally:
                    os.close(life)
            kept.pop_all()  # from here on it is `close` that ends them
        self._began(config)

    def _spawn(self, fds: tuple[int, int, int]) -> subprocess.Popen[bytes]:
        spec = self._spec
        return subprocess.Popen(  # noqa: S603  this interpreter and a module of this package
            [*_COMMAND, "serve", self._name, *map(str, fds), str(spec.folder), spec.name, spec.fingerprint],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a backend prints is a log line, and never the executor's own
            pass_fds=fds,
        )

    def _began(self, config: DeviceConfig) -> None:
        try:
            made, _ = self._ask("create", write_device_config(config))
            self._dtype = DType(made["dtype"])
            self._device: str = made["device"]
            self._ways = dict(made["ways"])
            self._kv = KvSpec(**{**made["kv"], "token_shape": tuple(made["kv"]["token_shape"])})
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            self.close()
            raise StartError(str(error) if self._name in str(error) else f"backend {self._name}: {error}") from error
        except BaseException:
            self.close()
            raise

    @property
    def kv(self) -> KvSpec:
        """The cache it was created with."""
        return self._kv

    @property
    def dtype(self) -> DType:
        """The type it was created with."""
        return self._dtype

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._device

    @property
    def ways(self) -> Mapping[str, str]:
        """How it computes, as `Tuned`."""
        return self._ways

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step there.

        Raises:
            ModelLost: the process died, or tells what can not be.
            RuntimeError: the backend raised.
        """
        self._ask("step", {}, {name: getattr(batch, name) for name in _FIELDS})
        rows, columns = len(batch.logits_rows), self._spec.decoder.vocabulary_size
        logits = np.frombuffer(self._memory, np.float32, rows * columns).reshape(rows, columns)
        return StepOutput(logits)

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy KV out of the cache there.

        Raises:
            ValueError: these tokens are not within these blocks.
        """
        _, arrays = self._ask("export_kv", {"blocks": list(blocks), "tokens": [tokens.start, tokens.stop]})
        return KvChunk(tokens, arrays["data"])

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache there.

        Raises:
            ValueError: it does not fit.
        """
        check_transfer(self._kv, blocks, chunk.tokens)
        check_chunk(self._kv, chunk)
        where = {"blocks": list(blocks), "tokens": [chunk.tokens.start, chunk.tokens.stop]}
        self._ask("import_kv", where, {"data": chunk.data})

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy whole blocks out of the cache there.

        Raises:
            ValueError: a block is not of this cache.
            RuntimeError: it has no native form.
        """
        return self._ask("export_blocks", {"blocks": list(blocks)})[1]["data"]

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy whole blocks into the cache there.

        Raises:
            ValueError: a block is not of this cache, or the bytes are not so many.
            RuntimeError: it has no native form.
        """
        check_native(self._kv, blocks, data)
        self._ask("import_blocks", {"blocks": list(blocks)}, {"data": data})

    def copy_prefix(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Copy the KV of a prefix there; how many blocks of it were.

        Raises:
            ValueError: a block is not of this cache, or they are not as many.
            ModelLost: the process died, or tells what can not be.
            RuntimeError: it copies none.
        """
        check_copy(self._kv, source, target)
        copied = self._ask("copy_prefix", {"source": list(source), "target": list(target)})[0]["copied"]
        if not isinstance(copied, int) or not 0 <= copied <= len(source):
            raise ModelLost(f"backend {self._name} says that it copied {copied!r} of {len(source)} blocks")
        return copied

    def close(self) -> None:
        """End the process, and with it all that it holds. Idempotent."""
        self._ours.close()
        try:
            self._process.wait(_ENDING_SECONDS if self._doing == "" else 0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._life >= 0:
            os.close(self._life)
            self._life = -1
        # Logits of the last step may still be held; then the memory is given back with them.
        with contextlib.suppress(BufferError):
            self._memory.close()

    def _ask(self, kind: str, facts: dict[str, Any], arrays: Arrays | None = None) -> tuple[Any, Arrays]:
        with self._lock:
            self._doing = kind
            try:
                send(self._ours, kind, facts, arrays)
                answer, said, given = receive(self._ours)
            except Ended:
                raise self._lost() from None
            except (ValueError, TypeError, KeyError) as error:
                raise ModelLost(f"backend {self._name} answers with what is no frame: {error}") from error
            self._doing = ""
        if answer == "raised":
            raise self._raised(kind, said)
        return said, given

    def _raised(self, doing: str, said: Mapping[str, str]) -> Exception:
        kind, text = RAISED.get(said["kind"], RuntimeError), said["text"]
        if kind in {ModelLost, StartError}:
            return kind(text if self._name in text else f"backend {self._name}: {text}")
        return kind(f"backend {self._name} raised in {doing}: {text}")

    def _lost(self) -> ModelLost:
        if self._ours.fileno() < 0:
            return ModelLost(f"the model of backend {self._name} is closed")
        try:
            how = manner_of_death(self._process.wait(_ENDING_SECONDS))
        except subprocess.TimeoutExpired:
            how = "it hung up, and runs on"
        return ModelLost(f"backend {self._name} died in {self._doing}: {how}")


def registration_apart(report: BackendReport) -> Registration:
    """A backend that was asked in a process of its own, to be run in another one."""

    def probe() -> Availability:
        return report.availability

    def capabilities(_: ModelSpec) -> Capabilities | Unsupported:
        return report.capabilities or Unsupported("was not asked")

    def create(spec: ModelSpec, config: DeviceConfig) -> ModelApart:
        return ModelApart(report.name, spec, config)

    return Registration(report.name, probe, capabilities, create)


def _memory_file(size: int) -> BinaryIO:
    """An unnamed file of zeros that takes memory where it is written to. Containers limit /dev/shm, but not this."""
    if sys.platform == "linux":
        file: BinaryIO = os.fdopen(os.memfd_create("penstock-logits"), "r+b")
    else:
        file = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    file.truncate(size)
    return file
