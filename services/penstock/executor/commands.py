"""What other threads want of the engine."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from penstock.common.logs import logger

__all__ = ["Commands"]


class Commands:
    """Given from any thread, and obeyed by the engine's between two steps.

    Attributes:
        changed: notified of each command; who waits for more than commands waits for it as well.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._over = False

    def __bool__(self) -> bool:
        """Whether any wait, or one is being obeyed."""
        return bool(self._waiting)

    @property
    def over(self) -> bool:
        """Whether no more steps come. For as long as `changed` is held it stays so."""
        return self._over

    def give(self, command: Callable[[], None]) -> bool:
        """Have something done between two steps; False where no more steps come."""
        with self.changed:
            if not self._over:
                self._waiting.append(command)
                self.changed.notify_all()
            return not self._over

    def obey(self) -> None:
        """Do what waits."""
        while self._waiting:
            try:
                self._waiting[0]()
            finally:
                self._waiting.popleft()  # not before it is done: other threads read whether any wait

    def end(self) -> None:
        """Obey for the last time, whatever some of the commands raise."""
        with self.changed:
            self._over = True
        while self._waiting:
            try:
                self.obey()
            except Exception as error:  # noqa: BLE001  nothing is left to be saved but the others
                logger().error("a command failed", error=f"{type(error).__name__}: {error}")
