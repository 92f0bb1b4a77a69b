"""A client that asks the same thing again and again while something is done to the suite."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter

import measuring  # noqa: F401 - before gRPC, for what it sets
from penstock.client import Client, PenstockError

__all__ = ["Asking"]


class Asking(threading.Thread, ABC):
    """Asks once, undisturbed, when it is made, and then, started, until `stop`.

    Attributes:
        outcomes: answers that were `right`, the same as the first, or `wrong`, and what `ask` counts besides.
        errors: of requests that failed.
    """

    def __init__(self, client: Client, prompt: str, tokens: int, stop: threading.Event) -> None:
        super().__init__()
        self.client, self.prompt, self.tokens = client, prompt, tokens
        self.outcomes: Counter[str] = Counter()
        self.errors: list[str] = []
        self._end = stop
        self.expected = self.ask()

    @abstractmethod
    def ask(self) -> str:
        """One request; the answer's text."""

    def run(self) -> None:
        while not self._end.is_set():
            try:
                text = self.ask()
            except PenstockError as error:
                self.errors.append(repr(error))
                continue
            self.outcomes["right" if text == self.expected else "wrong"] += 1
