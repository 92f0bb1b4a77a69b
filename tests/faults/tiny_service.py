"""A service that does nothing but live and die as it is told: tiny_service.py NAME BEHAVIOUR [--listen A] [--process NAME] [--supervisor-fd N]."""

import argparse
import asyncio
import gc
import os
import socket
import sys

from penstock.common import lifecycle, logs
from penstock.common.service import StartError


class TinyService:
    def __init__(self, name: str, behaviour: str, listen: str) -> None:
        self.name = name
        self._behaviour = behaviour
        self._address = listen.rsplit(":", 1)
        self._socket = socket.socket()

    async def start(self) -> dict[str, str]:
        tell(f"pid {os.getpid()}")
        if self._behaviour == "refuses":
            raise StartError("the model is not there")
        if self._behaviour == "never starts":
            await asyncio.Event().wait()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((self._address[0], int(self._address[1])))
        self._socket.listen()
        host, port = self._socket.getsockname()
        return {"grpc": f"{host}:{port}"}

    async def wait(self) -> None:
        if self._behaviour == "fails":
            raise RuntimeError("the engine stopped")
        if self._behaviour == "returns":
            return
        if self._behaviour == "counts objects":
            tell(f"objects to look at: {len(gc.get_objects())}")
        await asyncio.Event().wait()

    async def drain(self) -> None:
        tell("draining")
        if self._behaviour == "drains for ever":
            await asyncio.Event().wait()
        tell("drained")

    async def close(self) -> None:
        self._socket.close()
        tell("closed")


def tell(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("behaviour")
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--grace", type=float, default=60)
    parser.add_argument("--process")
    parser.add_argument("--supervisor-fd", type=int)
    arguments = parser.parse_args()
    if arguments.behaviour == "misconfigured":
        sys.stderr.write("penstock: settings.yaml: worker: unknown setting x\n")
        return 1
    logs.configure(arguments.name, process=arguments.process)
    if arguments.supervisor_fd is not None:
        lifecycle.die_with(arguments.supervisor_fd)
    return lifecycle.run(TinyService(arguments.name, arguments.behaviour, arguments.listen), arguments.grace)


sys.exit(main())
