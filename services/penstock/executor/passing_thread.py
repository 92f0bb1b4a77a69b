"""Work on a thread that ends with it."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

__all__ = ["on_a_passing_thread"]

T = TypeVar("T")


def on_a_passing_thread(work: Callable[[], T]) -> T:
    """What a piece of work gives or raises, done on a thread of its own.

    For what computes before an engine does. OpenMP, which PyTorch computes with, keeps helpers for every thread that has computed,
    for as long as that one lives. Where they are more than the cores, those that wait sleep at once and do not spin for a moment,
    and each of a step's thousand products has to wake them: an engine's steps took twice as long with its model warmed up on a
    thread that lived on.

    Where the wait is interrupted the work goes on. Whoever ends the process then has to do it at once (`os._exit`).
    """
    outcome: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:  # noqa: BLE001  it is raised again where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="passing", daemon=True)
    thread.start()
    try:
        return outcome.result()
    finally:
        if outcome.done():
            thread.join()
            del outcome, run, thread  # an error's traceback has this frame, and the frame should not have the error
