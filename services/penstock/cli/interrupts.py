"""Ctrl-C while modules are imported or a model is loaded: nothing is there to be given back yet.

Some modules turn it into errors of their own; and Python, where it ends in good order while another thread computes in a backend's
library, ends that thread in a way that aborts the process.
"""

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
