"""Network namespaces joined by a bridge, whose links can be cut: packets are dropped in silence, as by a switch that has died."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import uuid


@functools.cache
def why_not() -> str:
    """Why no namespaces can be had here; nothing if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nft"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command {tool}"
    probe = f"penstock-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    ruled = subprocess.run(
        ["ip", "netns", "exec", probe, "nft", "add", "table", "inet", "probe"], capture_output=True, text=True, check=False
    )
    _run("ip", "netns", "delete", probe)
    return f"nft does not work in a namespace: {ruled.stderr.strip()}" if ruled.returncode else ""


class Network:
    """Hosts on one bridge, each a namespace of its own; the tests' own namespace is another host, `here`."""

    def __init__(self, *names: str) -> None:
        self._id = uuid.uuid4().hex[:5]
        self._net = f"10.{os.getpid() % 200 + 20}.{int(self._id[:2], 16)}"
        self._hub = f"pst-{self._id}"
        self.here = f"{self._net}.1"
        self.addresses = {name: f"{self._net}.{number}" for number, name in enumerate(names, start=2)}
        self._up: list[str] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._add_namespace(self._hub)
        _run("ip", "-n", self._hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self._hub, "link", "set", "bridge", "up")
        self._join(None, self.here, "h")
        for number, (name, address) in enumerate(self.addresses.items()):
            self._add_namespace(self._space(name))
            self._join(self._space(name), address, str(number))
            _nft(self._space(name), "add", "table", "inet", "cut")
            _nft(self._space(name), "add", "chain", "inet", "cut", "in", "{ type filter hook input priority 0 ; }")
            _nft(self._space(name), "add", "chain", "inet", "cut", "out", "{ type filter hook output priority 0 ; }")

    def _space(self, name: str) -> str:
        return f"{self._hub}-{name}"

    def _add_namespace(self, space: str) -> None:
        _run("ip", "netns", "add", space)
        self._up.append(space)
        _run("ip", "-n", space, "link", "set", "lo", "up")

    def _join(self, space: str | None, address: str, suffix: str) -> None:
        inner, outer = f"p{self._id}{suffix}", f"b{self._id}{suffix}"
        _run("ip", "-n", self._hub, "link", "add", outer, "type", "veth", "peer", "name", inner)
        _run("ip", "-n", self._hub, "link", "set", outer, "master", "bridge", "up")
        _run("ip", "-n", self._hub, "link", "set", inner, "netns", space or str(os.getpid()))
        into = ("ip", "-n", space) if space else ("ip",)
        _run(*into, "address", "add", f"{address}/24", "dev", inner)
        _run(*into, "link", "set", inner, "up")

    def command(self, name: str) -> list[str]:
        """What stands before a command that is to run on a host."""
        return ["ip", "netns", "exec", self._space(name)]

    def cut(self, name: str, other: str | None = None) -> None:
        """Drop all that a host sends to, and would hear from, another one; or everybody."""
        for chain, side in (("in", "saddr"), ("out", "daddr")):
            who = [] if other is None else ["ip", side, self.addresses.get(other, self.here)]
            _nft(self._space(name), "add", "rule", "inet", "cut", chain, *who, "drop")

    def heal(self, name: str) -> None:
        """Let everything through again."""
        _nft(self._space(name), "flush", "table", "inet", "cut")

    def close(self) -> None:
        """Give all of it back. What runs there has ended before."""
        for space in reversed(self._up):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        self._up = []


def _nft(space: str, *words: str) -> None:
    _run("ip", "netns", "exec", space, "nft", *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
