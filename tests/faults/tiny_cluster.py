"""A supervisor of two tiny services, `base` and, in a later stage, `worker`: tiny_cluster.py WORKER_BEHAVIOUR [GRACE]."""

import asyncio
import sys
from pathlib import Path

from penstock.cli.cluster.child import Program
from penstock.cli.cluster.console import Console
from penstock.cli.cluster.group import Group
from penstock.cli.cluster.restarts import RestartPolicy
from penstock.cli.cluster.supervisor import supervise

SERVICE = str(Path(__file__).with_name("tiny_service.py"))


def program(name: str, behaviour: str) -> Program:
    argv = (sys.executable, SERVICE, name, behaviour)
    return Program(name=name, service=name, argv=argv, listen={"grpc": ("--listen", "127.0.0.1:0")})


async def bring_up(group: Group) -> str:
    base = await group.start(program("base", "serves"), stage=0)
    worker = await group.start(program("worker", sys.argv[1]), stage=1)
    return f"ready base={base['grpc']} worker={worker['grpc']}"


grace = float(sys.argv[2]) if len(sys.argv) > 2 else 60.0
policy = RestartPolicy(limit=3, first_delay=0.01)
sys.exit(asyncio.run(supervise(bring_up, Console(sys.stderr), policy, grace)))
