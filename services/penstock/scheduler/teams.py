"""The executors that can run the same requests, by what each is given to do; which of them can exchange KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.common.placement import PlacementReason
from penstock.scheduler.config import Policy
from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Role

__all__ = ["Team", "team_of"]

_HOME_ROLES = (Role.DECODE, Role.BOTH)


@dataclass(frozen=True, slots=True)
class Team:
    """Who does what.

    Attributes:
        members: all of them.
        homes: those that run a request from its first token to its last: all that are not there for prefill alone, or everyone
            where there are no others.
        senders: those that prefill for others, by the version of the model.
        receivers: those of the homes that take KV over from a sender.
        whole: why no request is split here; None where some may be.
        home_role: the homes' own, and what most of the work there is where they differ.
        calibrated: whether all have measured their steps.
    """

    members: tuple[Executor, ...]
    homes: tuple[Executor, ...]
    whole: PlacementReason | None
    home_role: Role
    calibrated: bool = False
    senders: Mapping[str, tuple[Executor, ...]] = field(default_factory=dict)
    receivers: frozenset[Executor] = frozenset()

    @property
    def sender_role(self) -> Role:
        """The senders' own."""
        return next(e.role for senders in self.senders.values() for e in senders)


def team_of(members: Sequence[Executor], policy: Policy) -> Team:
    """Sort executors by their roles.

    Executors with the role `both` prefill for others only where the policy is to split all requests, and nobody else does.
    """
    everyone = tuple(members)
    homes = tuple(e for e in everyone if e.role is not Role.PREFILL)
    prefilling = [e for e in everyone if e.role is Role.PREFILL]
    if not prefilling and policy == "apart":
        prefilling = [e for e in everyone if e.role is Role.BOTH]
    home_role = min((e.role for e in homes), key=_HOME_ROLES.index, default=Role.PREFILL)
    if policy == "together":
        return Team(everyone, homes or everyone, PlacementReason.POLICY, home_role)
    if not homes:
        return Team(everyone, everyone, PlacementReason.NO_DECODE_EXECUTOR, home_role)
    if not prefilling or (len(homes) == 1 and prefilling == [homes[0]]):
        return Team(everyone, homes, PlacementReason.NO_PREFILL_EXECUTOR, home_role)
    senders = _senders(prefilling)
    receivers = frozenset(e for e in homes if "import_kv" in e.description.features and _others(senders, e))
    if not receivers:
        return Team(everyone, homes, PlacementReason.INCOMPATIBLE, home_role)
    calibrated = all(e.description.times is not None for e in everyone)
    return Team(everyone, homes, None, home_role, calibrated, senders, receivers)


def _senders(prefilling: Sequence[Executor]) -> dict[str, tuple[Executor, ...]]:
    senders: dict[str, tuple[Executor, ...]] = {}
    for executor in prefilling:
        description = executor.description
        if description.model_fingerprint and "export_kv" in description.features:
            senders[description.model_fingerprint] = (*senders.get(description.model_fingerprint, ()), executor)
    return senders


def _others(senders: Mapping[str, tuple[Executor, ...]], receiver: Executor) -> bool:
    found = senders.get(receiver.description.model_fingerprint, ())
    return any(e is not receiver for e in found)
