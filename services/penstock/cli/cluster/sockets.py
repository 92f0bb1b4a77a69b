"""Where the control doors of this user's clusters are: a Unix socket each, in a folder of the user's own."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from urllib.parse import quote

from penstock.common.addresses import host_and_port
from penstock.common.config import ConfigError

__all__ = ["find", "folder", "grpc_target", "running", "socket_path"]

_SUFFIX = ".sock"
_WILDCARDS = {"0.0.0.0", "[::]"}
# What sockaddr_un holds on Linux, the last byte being 0; it is 103 on macOS.
_LONGEST_PATH = 103


def folder() -> Path:
    """The folder, made where there is none: $XDG_RUNTIME_DIR/penstock, or one of the user's own among the temporary files.

    Raises:
        ConfigError: it can not be made, or is not the user's alone. Whoever can write there could take a door's place.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(runtime) / "penstock" if runtime else Path(tempfile.gettempdir()) / f"penstock-{os.geteuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; XDG_RUNTIME_DIR says where else to look") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{path}: must be a folder of the user's own that nobody else can open (chmod 700)")
    return path


def socket_path(address: str) -> Path:
    """Where a cluster whose gRPC door listens at HOST:PORT has its control door. What a dead one has left there is removed.

    Raises:
        ConfigError: there is no fit folder, the path is too long for a socket, or another cluster answers there.
    """
    path = folder() / f"{address}{_SUFFIX}"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(f"{path}: is too long for a socket; XDG_RUNTIME_DIR says where else")
    if _answers(path):
        raise ConfigError(f"{path}: another cluster answers there")
    return path


def grpc_target(path: Path) -> str:
    """The name by which gRPC knows the socket, to serve and to call."""
    return f"unix:{quote(str(path))}"


def running() -> dict[str, Path]:
    """The control doors that answer, by the addresses of their clusters' gRPC doors."""
    return {path.name.removesuffix(_SUFFIX): path for path in sorted(folder().glob(f"*{_SUFFIX}")) if _answers(path)}


def find(target: str | None) -> Path:
    """The control door of the cluster whose gRPC door this is, or of the only one that runs.

    Raises:
        ConfigError: there is none, or there are several to choose from.
    """
    doors = running()
    found = [path for address, path in doors.items() if target is None or _same(address, target)]
    if not found:
        which = "" if target is None else f" with its gRPC door at {target}"
        others = f"; there are {', '.join(doors)}" if doors else ""
        raise ConfigError(f"no cluster of this user's that penstock up started runs here{which}{others}")
    if len(found) > 1:
        raise ConfigError(f"--target: several clusters run here, with their gRPC doors at {', '.join(doors)}; say which")
    return found[0]


def _same(door: str, target: str) -> bool:
    """Whether a door that listens at the one address can be meant by the other."""
    if door == target:
        return True
    try:
        (host, port), (meant, meant_port) = host_and_port(door), host_and_port(target.removeprefix("grpc://"))
    except ValueError:
        raise ConfigError(f"--target: must be HOST:PORT of a gRPC door, and is {target}") from None
    return port == meant_port and (host in _WILDCARDS or not _addresses(host).isdisjoint(_addresses(meant)))


def _addresses(host: str) -> set[str]:
    bare = host.strip("[]")
    with contextlib.suppress(OSError):
        return {str(address[0]) for *_, address in socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)}
    return {bare}


def _answers(path: Path) -> bool:
    """Whether somebody listens; a socket that nobody listens at any more, since its process was killed, is removed."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return False
    return True
