"""Ctrl-C while modules are imported: some of them turn it into errors of their own, and none has anything to give back."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["at_once"]


@contextmanager
def at_once() -> Iterator[None]:
    """Have Ctrl-C end the process at once, without a word and with status 130, where it would raise KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # such as where a shell has it ignored
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
