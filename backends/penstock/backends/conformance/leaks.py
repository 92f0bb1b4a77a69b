"""Checks that what a model took is back once it is closed: memory, mappings, descriptors and threads."""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from penstock.backends.conformance.checkpoints import write_checkpoint
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import DType, GenerativeModel, ModelSpec

__all__ = ["closed_models_leave_nothing", "failed_starts_leave_nothing"]

_WARM_UP, _CYCLES = 2, 4
_CACHE_BYTES = 32 << 20
_WIDE_VOCABULARY = 65_536
_BYTES = {DType.F32: 4.0, DType.BF16: 2.0, DType.INT8: 1.0, DType.INT4: 0.5}


@dataclass(frozen=True, slots=True)
class _Held:
    """What the process holds.

    Attributes:
        memory: bytes of mappings that may be written to, touched or not, and of those of the checkpoint; what is free in the
            allocator's own mappings does not count, for how much that is depends on where small things happen to lie.
        resident: bytes of them, and of all others, that lie in memory: what the allocator hides in its own mappings shows here.
    """

    memory: int
    resident: int
    descriptors: int
    threads: int

    @classmethod
    def after(cls, cycle: Callable[[], None], checkpoint: ModelSpec) -> _Held:
        cycle()
        gc.collect()
        with suppress(AttributeError):  # a C library other than glibc: it has no free memory of its own to give back
            ctypes.CDLL(None).malloc_trim(0)
        process = psutil.Process()
        return cls(_mapped(checkpoint) - _free_in_heap(), process.memory_info().rss, process.num_fds(), process.num_threads())


def closed_models_leave_nothing(subject: Subject) -> None:
    """Models that come and go leave neither their weights, nor their cache, nor a descriptor or a thread each."""
    closed: list[GenerativeModel] = []  # kept: it is `close` that gives back, not the end of the last reference
    with _heavy(subject) as spec:

        def cycle() -> None:
            with subject.model(spec, kv_cache_bytes=_cache_bytes(subject)) as model:
                subject.driver(model).logits(subject.ids(20))
                closed.append(model)

        _assert_nothing_stays(subject, spec, cycle, "models that were closed")


def failed_starts_leave_nothing(subject: Subject) -> None:
    """Starts that fail when the weights are read already, for want of memory for the cache, leave nothing either."""
    with _heavy(subject) as spec:

        def cycle() -> None:
            refused(lambda: subject.registration.create(spec, subject.config(kv_cache_bytes=1)), "a cache of a byte", Exception)

        _assert_nothing_stays(subject, spec, cycle, "starts that failed")


def _assert_nothing_stays(subject: Subject, spec: ModelSpec, cycle: Callable[[], None], what: str) -> None:
    """Twice, if need be: a leak is there again, and what an allocator has taken for itself once is not."""
    try:
        _measure(subject, spec, cycle, what)
    except AssertionError:
        _measure(subject, spec, cycle, what)


def _measure(subject: Subject, spec: ModelSpec, cycle: Callable[[], None], what: str) -> None:
    """The least that the process holds behind the last cycles is what it held behind the first ones.

    The least, because allocators keep what was given back for a while; the first cycles, because libraries fill their caches.
    """
    for _ in range(_WARM_UP):
        cycle()
    first, last = ([_Held.after(cycle, spec) for _ in range(_CYCLES)] for _ in range(2))
    least = min(_weight_bytes(spec, subject.dtype) if subject.computes else _CACHE_BYTES, _cache_bytes(subject))
    memory, resident, descriptors, threads = (
        min(getattr(held, kind) for held in last) - min(getattr(held, kind) for held in first)
        for kind in ("memory", "resident", "descriptors", "threads")
    )
    memory = max(memory, resident)
    require(memory < least * _CYCLES // 2, f"{_CYCLES} {what} left {memory >> 20} MiB; each held {least >> 20} MiB or more")
    require(descriptors < _CYCLES, f"{_CYCLES} {what} left {descriptors} descriptors")
    require(threads < _CYCLES, f"{_CYCLES} {what} left {threads} threads")


@contextmanager
def _heavy(subject: Subject) -> Iterator[ModelSpec]:
    """The subject's model, or one like it with weights that are large enough to be missed."""
    if not Path("/proc/self/maps").exists():
        raise NotApplicable("this system does not tell what a process holds")
    if _weight_bytes(subject.spec, subject.dtype) >= _CACHE_BYTES // 2:
        yield subject.spec
        return
    config = json.loads((subject.spec.folder / "config.json").read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        yield write_checkpoint(Path(folder), {**config, "vocab_size": _WIDE_VOCABULARY})


def _weight_bytes(spec: ModelSpec, dtype: DType) -> int:
    """As held, of the matrices that every backend has to hold."""
    decoder = spec.decoder
    return int(decoder.vocabulary_size * decoder.hidden_size * _BYTES[dtype])


def _cache_bytes(subject: Subject) -> int:
    return max(_CACHE_BYTES, subject.cache_bytes)


class _Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def _free_in_heap() -> int:
    """Bytes that the C library's allocator keeps in its mappings and has given to nobody; 0 where it does not tell."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:  # not glibc, or one before 2.33
        return 0
    mallinfo2.restype = _Mallinfo2
    return int(mallinfo2().fordblks)


def _mapped(checkpoint: ModelSpec) -> int:
    """Bytes of this process's mappings that are private and may be written, or are of the checkpoint's files.

    What is only reserved does not count: the C library reserves much more for each thread than it uses.
    """
    total = 0
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, permissions, *rest = line.split(maxsplit=5)
        if permissions.startswith("rw") or (len(rest) == 4 and rest[3].startswith(str(checkpoint.folder.resolve()))):
            start, end = (int(address, 16) for address in addresses.split("-"))
            total += end - start
    return total
