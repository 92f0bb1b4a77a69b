"""The process of an outside backend.

``python -m penstock.backends.apart inspect NAME FD [FOLDER MODEL FINGERPRINT]`` writes what it says of itself to a file,
``… serve NAME SOCKET_FD SHARED_FD LIFE_FD FOLDER MODEL FINGERPRINT`` runs a model.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from penstock.backends.checkpoint import read_model
from penstock.backends.discovery import sources
from penstock.backends.inspection import tell

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Do the one thing, and leave without waiting for anything that the backend has started."""
    what, name, fd, *rest = arguments
    *others, folder, model, fingerprint = rest or ("", "", "")
    spec = read_model(Path(folder), model, known=fingerprint) if folder else None
    if what == "inspect":
        tell(int(fd), sources()[name], spec)
    elif spec is not None:
        from penstock.backends.apart.serving import serve

        with socket.socket(fileno=int(fd)) as connection:
            serve(connection, int(others[0]), int(others[1]), sources()[name], spec)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
