"""Files that others see whole or not at all."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Put a file in place of what was there, with all of `parts` in it. Nothing is left of a write that fails.

    Raises:
        OSError: it can not be written.
    """
    written: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            written = Path(file.name)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except BaseException:
        if written is not None:
            with suppress(OSError):
                written.unlink()
        raise
