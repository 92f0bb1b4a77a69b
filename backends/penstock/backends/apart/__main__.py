"""``python -m penstock.backends.apart inspect NAME FD [FOLDER MODEL]``: the process in which an outside backend is asked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from penstock.backends.checkpoint import read_model
from penstock.backends.discovery import sources
from penstock.backends.inspection import tell

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Answer the one question, and leave without waiting for anything that the backend has started."""
    _, name, fd, *model = arguments
    spec = read_model(Path(model[0]), model[1]) if model else None
    tell(int(fd), sources()[name], spec)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
