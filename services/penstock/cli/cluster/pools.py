"""Executors by role: how many of each, their names, and what each gets of the machine."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from penstock.common.config import ConfigError

__all__ = [
    "FLAGS",
    "MOST_EXECUTORS",
    "ROLES",
    "ExecutorPlan",
    "Role",
    "check_counts",
    "first_plans",
    "joining_plans",
    "pools",
    "scaled",
]

Role = Literal["prefill", "decode", "both"]
ROLES: tuple[Role, ...] = ("prefill", "decode", "both")
# How a user says how many there are to be of each.
FLAGS: Mapping[Role, str] = {"prefill": "--prefill", "decode": "--decode", "both": "--workers"}
# Each is a process that holds the model: a typing error must not start thousands.
MOST_EXECUTORS = 64

_NAMES: Mapping[Role, str] = {"prefill": "prefill", "decode": "decode", "both": "executor"}
# Of the memory that is free when they load, for the KV caches of all.
_CACHES_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class ExecutorPlan:
    """One executor of a local cluster.

    Attributes:
        name: its process's name.
        pool: what it was started as; says which of the pools' settings it has.
        role: what it is now.
        threads: threads that it computes with; None leaves it to find out by itself.
        kv_cache_share: share of the free memory that its KV cache takes; None leaves its own default.
    """

    name: str
    pool: Role
    role: Role
    threads: int | None = None
    kv_cache_share: float | None = None


def pools(prefill: int, decode: int, workers: int | None) -> dict[Role, int]:
    """Executors by role that a start was asked for: one that does both where nothing was.

    Raises:
        ConfigError: a number is none, or none is left.
    """
    if workers is None:
        workers = 0 if prefill or decode else 1
    return _whole({"prefill": prefill, "decode": decode, "both": workers})


def scaled(now: Mapping[Role, int], wanted: Mapping[Role, int]) -> dict[Role, int]:
    """Executors by role once a running cluster is scaled; what is not asked for stays.

    Raises:
        ConfigError: a number is none, or none would be left.
    """
    return _whole({**now, **wanted})


def check_counts(counts: Mapping[Role, int]) -> None:
    """Refuse numbers that are none.

    Raises:
        ConfigError: names the flag.
    """
    for role, count in counts.items():
        if not 0 <= count <= MOST_EXECUTORS:
            raise ConfigError(f"{FLAGS[role]}: must be from 0 to {MOST_EXECUTORS}, and is {count}")


def _whole(counts: dict[Role, int]) -> dict[Role, int]:
    check_counts(counts)
    total = sum(counts.values())
    if not 1 <= total <= MOST_EXECUTORS:
        raise ConfigError(f"{', '.join(FLAGS.values())}: must be from 1 to {MOST_EXECUTORS} executors together, and are {total}")
    return counts


def first_plans(counts: Mapping[Role, int], threads: int | None) -> list[ExecutorPlan]:
    """The executors of a start. They share the threads, and the memory, since all of them load at the same time."""
    total = sum(counts.values())
    if total == 1:
        role = next(role for role in ROLES if counts[role])
        name = _NAMES[role] if role == "both" else f"{_NAMES[role]}-0"
        return [ExecutorPlan(name=name, pool=role, role=role, threads=threads)]
    each, over = divmod(_threads(threads), total)
    roles = [role for role in ROLES for _ in range(counts[role])]
    names = [name for role in ROLES for name in _free_names(role, counts[role], ())]
    return [
        ExecutorPlan(
            name=name, pool=role, role=role, threads=max(1, each + (i < over)), kv_cache_share=round(_CACHES_SHARE / total, 4)
        )
        for i, (role, name) in enumerate(zip(roles, names, strict=True))
    ]


def joining_plans(role: Role, joining: int, total: int, threads: int | None, taken: Collection[str]) -> list[ExecutorPlan]:
    """Executors that join a running cluster.

    Those that run keep their threads, so a new one gets what each would have had if all `total` had been started together; the
    same goes for its share of the memory, of which what the others hold is no longer free.
    """
    share = round(_CACHES_SHARE / total, 4)
    each = max(1, _threads(threads) // total)
    return [
        ExecutorPlan(name=name, pool=role, role=role, threads=each, kv_cache_share=share)
        for name in _free_names(role, joining, taken)
    ]


def _threads(threads: int | None) -> int:
    return len(os.sched_getaffinity(0)) if threads is None else threads


def _free_names(role: Role, count: int, taken: Collection[str]) -> list[str]:
    prefix = _NAMES[role]
    # An executor alone has no number.
    taken = {f"{name}-0" if name == prefix else name for name in taken}
    free = (name for i in range(len(taken) + count) if (name := f"{prefix}-{i}") not in taken)
    return [next(free) for _ in range(count)]
