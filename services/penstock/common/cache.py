"""Where Penstock keeps what it can make again: the cache folder of the XDG Base Directory Specification."""

from __future__ import annotations

import os
from pathlib import Path

from penstock.common.logs import logger

__all__ = ["cache_folder", "found_cache"]


def cache_folder(given: str | None = None) -> Path:
    """The folder: `given`, else ``$XDG_CACHE_HOME/penstock``, else ``~/.cache/penstock``. It need not be there yet.

    Raises:
        RuntimeError: nothing was given, and the user has no home folder.
    """
    if given is not None:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "penstock"


def found_cache(given: str | None = None) -> Path | None:
    """The same for who can do without: None, and a line in the log, where there is none."""
    try:
        return cache_folder(given)
    except RuntimeError as error:
        logger().warning("no cache folder; set cache_folder or XDG_CACHE_HOME", error=str(error))
        return None
