"""Segments of shared memory: files of a memory file system that the receiving executor makes, and that outlive nobody.

A segment is locked, filled and as large as it will be before it has a name, so who sees a name without a lock sees one whose owner
is dead. The name goes when the sending executor has attached; between the two moments a killed owner would leave it. Such names are
swept away by every executor that starts, makes a segment, or lets go of one that it has sent through. Processes of other users can
neither open nor remove a segment; one of the same user could harm an executor in simpler ways.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import mmap
import os
import re
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FOLDER", "HEADER_BYTES", "PROOF_BYTES", "Segment", "SegmentOffer", "attach", "create", "sweep"]

FOLDER = Path("/dev/shm")  # noqa: S108 - files there are made without a name, and with one that nobody guesses
# A page, so that payload begins at one.
HEADER_BYTES = 4096
PROOF_BYTES = 32
_NAME = re.compile(r"penstock-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class SegmentOffer:
    """What the receiving end tells of its segment.

    Attributes:
        name: of 128 random bits.
        size: bytes that payload may take; the header stands before them.
        proof: stands at the segment's begin, so that the other end knows it for the one that was meant.
    """

    name: str
    size: int
    proof: bytes


class Segment:
    """A mapped segment. Its memory, descriptor and lock go back with the last view of it. `close` and `unlink` are idempotent."""

    def __init__(self, memory: mmap.mmap, path: Path) -> None:
        self._path: Path | None = path
        self._memory: memoryview | None = memoryview(memory)

    @property
    def payload(self) -> memoryview:
        """The bytes behind the header."""
        return self._view[HEADER_BYTES:]

    @property
    def proof(self) -> bytes:
        """What stands at its begin."""
        return bytes(self._view[:PROOF_BYTES])

    @property
    def answer(self) -> bytes:
        """What stands behind the proof, and is told by nobody but who has read it here."""
        return bytes(self._view[PROOF_BYTES : 2 * PROOF_BYTES])

    @property
    def _view(self) -> memoryview:
        if self._memory is None:
            raise ValueError("the segment is closed")
        return self._memory

    def unlink(self) -> None:
        """Take its name away; both ends keep their mappings."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def close(self) -> None:
        """Let go of it."""
        self._memory = None


def create(size: int, folder: Path = FOLDER) -> tuple[Segment, SegmentOffer]:
    """Make a segment with room for `size` bytes of payload, all of it reserved: nobody is killed for a full file system later.

    Raises:
        OSError: there is no such folder, no room in it, or it can hold no files without a name.
    """
    sweep(folder)
    proof, answer = secrets.token_bytes(PROOF_BYTES), secrets.token_bytes(PROOF_BYTES)
    name = f"penstock-{secrets.token_hex(16)}"
    with _opened(folder, os.O_TMPFILE | os.O_RDWR) as fd:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.posix_fallocate(fd, 0, HEADER_BYTES + size)
        os.pwrite(fd, proof + answer, 0)
        memory = _map(fd, HEADER_BYTES + size)
        # With a descriptor of a folder, Python follows the link, which is what gives an unnamed file a name.
        with _opened(Path("/proc/self/fd"), os.O_RDONLY | os.O_DIRECTORY) as own:
            os.link(str(fd), folder / name, src_dir_fd=own, follow_symlinks=True)
    return Segment(memory, folder / name), SegmentOffer(name, size, proof)


def attach(offer: SegmentOffer, folder: Path = FOLDER) -> Segment | None:
    """Map the segment that another process offers; None where it is not to be found: the two share no host.

    Raises:
        ValueError: what is found is not what was offered, or the offer's name is no segment's.
    """
    if not _NAME.fullmatch(offer.name):
        raise ValueError("the name is not one of a segment")
    path = folder / offer.name
    try:
        with _opened(path, os.O_RDWR | os.O_NOFOLLOW) as fd:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) != 0o600:
                raise ValueError("the segment belongs to another user, or is open to others")
            if found.st_size != HEADER_BYTES + offer.size:
                raise ValueError(f"the segment has {found.st_size} bytes, not the {HEADER_BYTES + offer.size} of the offer")
            segment = Segment(_map(fd, found.st_size), path)
    except (FileNotFoundError, PermissionError):
        return None
    if not hmac.compare_digest(segment.proof, offer.proof):
        raise ValueError("the segment does not begin with the proof that was offered")
    return segment


def sweep(folder: Path = FOLDER) -> int:
    """Remove segments whose owner is dead; how many they were."""
    removed = 0
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if _NAME.fullmatch(entry.name) and _orphaned(Path(entry.path)):
                with contextlib.suppress(OSError):
                    Path(entry.path).unlink()
                    removed += 1
    return removed


def _orphaned(path: Path) -> bool:
    try:
        with _opened(path, os.O_RDONLY | os.O_NOFOLLOW) as fd:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its owner lives, or it is another user's, or gone meanwhile
    return True


def _map(fd: int, size: int) -> mmap.mmap:
    # The mapping has a descriptor of its own, and with it the lock. Pages are in the table before payload comes: a fault for each
    # would cost as much as copying it.
    return mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)
