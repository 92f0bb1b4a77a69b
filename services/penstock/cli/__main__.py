"""The process of ``penstock`` and of ``python -m penstock.cli``. The command line is imported while Ctrl-C is quiet already."""

from __future__ import annotations

import os
import signal

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name, and exit with its status; 130 after Ctrl-C, also amid imports."""
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where a shell has it ignored, in the background
    if heeded:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from penstock.cli.app import main as run

    if heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
