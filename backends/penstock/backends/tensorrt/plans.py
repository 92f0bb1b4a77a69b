"""Plans on disk: an engine takes minutes to build, and is good for one model, type, version, GPU and set of profiles alone.

A file is a line of JSON, which says all that the plan was built for and the plan's length and checksum, and the plan behind it.
One that is cut short, changed, or says something else than its name is as good as absent. Files are written beside their place
and moved there, so that no reader sees a part of one.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from penstock.common.whole_files import write_whole

__all__ = ["PlanCache"]

_FORMAT = 1
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True, slots=True)
class PlanCache:
    """Plans and timing caches in a folder, which need not be there yet. Only its user may read it: a plan is code for the GPU.

    Where there is none, nothing is found and nothing is kept.
    """

    folder: Path | None

    @contextmanager
    def load(self, kind: str, built_for: Mapping[str, str]) -> Iterator[memoryview | None]:
        """What was stored for exactly this, mapped until the block ends; None: there is nothing, or it is not intact."""
        if self.folder is None:
            yield None
            return
        try:
            with _path(self.folder, kind, built_for).open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
                begin = file.tell()
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError):
            yield None
            return
        with mapped, memoryview(mapped) as whole, whole[begin:] as content:
            yield content if header == _header(built_for, content) else None

    def store(self, kind: str, built_for: Mapping[str, str], content: memoryview) -> None:
        """Keep `content` for the next start. A folder that can not be written to is told, and is no error."""
        if self.folder is None:
            return
        path = _path(self.folder, kind, built_for)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, json.dumps(_header(built_for, content)).encode() + b"\n", content)
        except OSError as error:
            warnings.warn(f"{self.folder} keeps no {kind} for the next start: {error}", stacklevel=2)


def _path(folder: Path, kind: str, built_for: Mapping[str, str]) -> Path:
    digest = hashlib.blake2b(json.dumps(built_for, sort_keys=True).encode(), digest_size=16).hexdigest()
    return folder / f"{digest}.{kind}"


def _header(built_for: Mapping[str, str], content: memoryview) -> dict[str, object]:
    return {"format": _FORMAT, "built_for": dict(built_for), "bytes": len(content), "crc32": zlib.crc32(content)}
