"""Weights in huge pages: a process that computes asks the C library for them before it starts for good."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

__all__ = ["computes", "start_again_with_huge_pages", "with_huge_pages"]

# glibc then advises huge pages for what it allocates, weights above all. A step that reads every weight spends less of its time on
# page tables: 2 to 7 % for bfloat16. glibc reads it when a process starts and at no other time.
_TUNABLE = "glibc.malloc.hugetlb"


def computes(arguments: Sequence[str]) -> bool:
    """Whether this command line runs a model in its own process."""
    return list(arguments[:1]) in (["executor"], ["calibrate"]) or list(arguments[:2]) == ["bench", "engine"]


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start again with; None where there is nothing to gain, or somebody has decided already."""
    given = environment.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or _TUNABLE in given:
        return None
    tunables = ":".join(word for word in (given, f"{_TUNABLE}=1") if word)
    return {**environment, "GLIBC_TUNABLES": tunables}


def start_again_with_huge_pages() -> None:
    """Replace this process, once, by one of the same command line whose C library allocates huge pages."""
    environment = with_huge_pages(os.environ)
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606 - the same command line
