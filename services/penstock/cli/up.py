"""`penstock up`: the whole suite on one machine, as supervised processes on loopback."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.cluster.checks import check, doors, metrics
from penstock.cli.cluster.concurrently import concurrently
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.executors import Executors
from penstock.cli.cluster.group import Group
from penstock.cli.cluster.plan import Plan
from penstock.cli.cluster.readiness import listed, serving, told
from penstock.cli.cluster.restarts import RestartPolicy
from penstock.cli.cluster.servicer import ClusterServicer
from penstock.cli.cluster.settings import UpConfig
from penstock.cli.cluster.sockets import socket_path
from penstock.cli.cluster.supervisor import supervise
from penstock.cli.interrupts import at_once
from penstock.cli.layers import SERVICES
from penstock.common import logs
from penstock.common.config import ConfigError, sections_of
from penstock.common.sources import default_name, resolve

__all__ = ["bring_up", "up"]


def up(
    model: str,
    *,
    config: Annotated[Path | None, Parameter(help="YAML file of these settings, and of a section per service.")] = None,
    settings: Annotated[UpConfig, Parameter(name="*")] = UpConfig(),
) -> int:
    """Serve a model on this machine: gateway, tokenizer, scheduler and executors, supervised.

    Prints one line to stdout once everything serves: ready http=HOST:PORT grpc=HOST:PORT. Logs go to stderr. Ctrl-C or SIGTERM
    lets running requests finish; a second one ends at once.

    Args:
        model: A folder, a Hugging Face hub id such as Qwen/Qwen3-0.6B (with @REVISION for a branch, tag or commit), or builtin.
        config: See its help.
        settings: See its fields.
    """
    sections = config if config and sections_of(config, SERVICES) else None
    with at_once():  # all backends are imported
        check(settings, sections)
    logs.configure("up", settings.log_level, settings.log_format)
    console = Console(sys.stderr, as_json=logs.are_json(settings.log_format))
    folder = resolve(model)
    plan = Plan(
        served_name=settings.served_name or default_name(model),
        folder=folder,
        settings=settings,
        doors=doors(settings, sections),
        config=sections,
        metrics=metrics(sections),
        console=sys.stderr.isatty(),
    )
    policy = RestartPolicy(limit=settings.max_restarts, healthy_after=settings.healthy_seconds)
    return asyncio.run(supervise(functools.partial(bring_up, plan, console), console, policy, settings.grace_seconds))


async def bring_up(plan: Plan, console: Console, group: Group) -> str:
    """Start every process of a plan, and return the line that tells that all of them serve."""
    settings = plan.settings
    text = f"serving {plan.folder} as {plan.served_name}{_apart(settings)}"
    console.line("up", text, event="serving", folder=str(plan.folder), model=plan.served_name, executors=settings.pools)
    scheduler = (await group.start(plan.scheduler(), stage=0))["grpc"]
    executors = Executors(plan, group, console, scheduler)

    async def open_doors() -> dict[str, str]:
        tokenizer = (await group.start(plan.tokenizer(), stage=1))["grpc"]
        await serving(tokenizer)
        return await group.start(plan.gateway(scheduler=scheduler, tokenizer=tokenizer), stage=3)

    async with told(console, "the model to load"):
        gateway, _ = await concurrently(open_doors(), executors.start())
    async with told(console, "the services to find each other"):
        await concurrently(serving(scheduler), serving(gateway["grpc"]))
        await listed(gateway["grpc"], plan.served_name)
    endpoints = {"scheduler": scheduler, "http": gateway["http"], "grpc": gateway["grpc"]}
    door = ClusterServicer(group, executors, console, {"model": plan.served_name, **endpoints})
    await _open(door, group, console, gateway["grpc"])
    return f"ready http={gateway['http']} grpc={gateway['grpc']}"


async def _open(door: ClusterServicer, group: Group, console: Console, address: str) -> None:
    """Let `penstock scale` and `role` in. A machine on which that can not be has a cluster all the same."""
    try:
        await door.open(socket_path(address))
    except (ConfigError, OSError, RuntimeError) as error:
        console.line("up", f"penstock scale and penstock role can not reach this cluster: {error}", level="warning")
    else:
        group.close_first(door.close)


def _apart(settings: UpConfig) -> str:
    """What a person wants to see of pools, where there are any."""
    counts = settings.pools
    if not counts["prefill"] and not counts["decode"]:
        return ""
    executors = ", ".join(f"{count} {role}" for role, count in counts.items() if count)
    return f", executors: {executors}, placement: {settings.placement}"
