"""The executors of a running cluster: how many there are of each role, and what each is."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace

import grpc.aio

from penstock.cli.cluster.concurrently import concurrently
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.group import Group
from penstock.cli.cluster.plan import Plan
from penstock.cli.cluster.pools import ROLES, ExecutorPlan, Role, first_plans, joining_plans, scaled
from penstock.cli.cluster.readiness import executor_id, give_role, registered, serving, told
from penstock.common.config import ConfigError
from penstock.common.service import StartError

__all__ = ["Executors"]

_STAGE = 2
# For an executor that has more to do than to answer at once.
_PATIENCE_SECONDS = 10.0

Tell = Callable[[str], None]


class Executors:
    """Starts a cluster's executors, and scales them while it runs. One change at a time: others wait for it."""

    def __init__(self, plan: Plan, group: Group, console: Console, scheduler: str) -> None:
        self._plan = plan
        self._group = group
        self._console = console
        self._scheduler = scheduler
        self._changing = asyncio.Lock()
        self.planned: dict[str, ExecutorPlan] = {}

    async def start(self) -> dict[str, str]:
        """Start those that the cluster begins with, and return when they are registered.

        Returns:
            where they listen, by process name.

        Raises:
            StartError: one can not start; says which and why.
        """
        settings = self._plan.settings
        plans = first_plans(settings.pools, settings.threads)
        addresses = await concurrently(*map(self._join, plans))
        return {planned.name: address for planned, address in zip(plans, addresses, strict=True)}

    async def scale(self, wanted: Mapping[Role, int], tell: Tell) -> None:
        """Have so many executors of these roles: newcomers first, until they serve, then the latest leave.

        Args:
            wanted: executors by role; what is absent stays as it is.
            tell: gets a sentence for each thing that happens.

        Raises:
            ConfigError: a number is none, or no executor would be left. Nothing has changed.
            StartError: a newcomer can not start. Those that could stay; nobody has left.
        """
        async with self._changing:
            now = Counter(planned.role for planned in self.planned.values())
            target = scaled({role: now[role] for role in ROLES}, wanted)
            joining = self._joining(now, target)
            if joining:
                async with told(self._console, "the model to load"):
                    # Each to its end: one that can not start must not take another with it.
                    done = await asyncio.gather(*(self._join(planned, tell) for planned in joining), return_exceptions=True)
                for error in (outcome for outcome in done if isinstance(outcome, BaseException)):
                    raise error
            await concurrently(*(self._leave(name, tell) for name in self._leaving(now, target)))

    async def set_role(self, executor: str, role: Role) -> str:
        """Give an executor another role; what runs on it is not disturbed. It keeps the role when it is started again.

        Args:
            executor: its process's name, or its id.
            role: what it is to be.

        Returns:
            the process's name.

        Raises:
            ConfigError: there is no such executor, or it does not take the role on.
            AioRpcError: the scheduler does not answer.
        """
        async with self._changing:
            name = await self._name(executor)
            try:
                found = await executor_id(self._group.members[name].bound["grpc"], _PATIENCE_SECONDS)
            except grpc.aio.AioRpcError as error:
                raise ConfigError(f"EXECUTOR: {name} does not answer now ({error.code().name})") from None
            await give_role(self._scheduler, found, role)
            planned = self.planned[name] = replace(self.planned[name], role=role)
            self._group.members[name].program = self._plan.executor(planned, scheduler=self._scheduler)
            return name

    async def _name(self, executor: str) -> str:
        """The name of the process that is meant by its name or its executor's id."""
        ids = {} if executor in self.planned else await self.ids()
        name = next((name for name, found in ids.items() if found == executor), executor)
        if name not in self.planned:
            raise ConfigError(f"EXECUTOR: must be one of {', '.join(self.planned)}, or an executor's id, and is {executor!r}")
        return name

    async def ids(self) -> dict[str, str]:
        """The ids of the executors that answer, by process name."""
        bound = {name: m.bound["grpc"] for name, m in self._group.members.items() if name in self.planned and "grpc" in m.bound}
        asked = await asyncio.gather(*map(executor_id, bound.values()), return_exceptions=True)
        return {name: found for name, found in zip(bound, asked, strict=True) if isinstance(found, str)}

    def _joining(self, now: Mapping[Role, int], target: Mapping[Role, int]) -> list[ExecutorPlan]:
        total, threads = sum(target.values()), self._plan.settings.threads
        wanting = [(role, target[role] - now[role]) for role in ROLES if target[role] > now[role]]
        taken = self._group.members
        return [planned for role, joining in wanting for planned in joining_plans(role, joining, total, threads, taken)]

    def _leaving(self, now: Mapping[Role, int], target: Mapping[Role, int]) -> list[str]:
        latest = [(role, now[role] - target[role]) for role in ROLES if target[role] < now[role]]
        return [
            name
            for role, leaving in latest
            for name in itertools.islice((n for n, p in reversed(self.planned.items()) if p.role == role), leaving)
        ]

    async def _join(self, planned: ExecutorPlan, tell: Tell = lambda _: None) -> str:
        tell(f"{planned.name} starts")
        program = self._plan.executor(planned, scheduler=self._scheduler, joins=bool(self.planned))
        self.planned[planned.name] = planned
        try:
            address = (await self._group.start(program, _STAGE))["grpc"]
        except StartError:
            del self.planned[planned.name]
            raise
        await serving(address)
        await registered(self._scheduler, address)
        tell(f"{planned.name} serves")
        return address

    async def _leave(self, name: str, tell: Tell) -> None:
        tell(f"{name} finishes what runs on it")
        await self._group.remove(name, self._plan.settings.grace_seconds)
        del self.planned[name]
        tell(f"{name} has left")
