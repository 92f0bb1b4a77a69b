"""Work that is done at once, and together or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

__all__ = ["concurrently"]

T = TypeVar("T")


async def concurrently(*work: Coroutine[Any, Any, T]) -> list[T]:
    """Their results, or the first exception, which cancels the rest."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
