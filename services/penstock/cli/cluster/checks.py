"""What can be known to be wrong before a model is downloaded or loaded."""

from __future__ import annotations

import contextlib
import math
import os
import socket
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from penstock.cli.cluster.settings import UpConfig
from penstock.cli.layers import SERVICES
from penstock.common.addresses import host_and_port
from penstock.common.config import ENVIRONMENT_PREFIX, ConfigError, read_file
from penstock.gateway.auth import load_keys

__all__ = ["check", "doors", "metrics"]

_POSITIVE = ("kv_cache_gib", "max_batch_tokens", "max_batch_size")
_NOT_NEGATIVE = ("max_restarts", "healthy_seconds", "grace_seconds")


def check(settings: UpConfig, config: Path | None) -> None:
    """Refuse settings with which the cluster can not start.

    Args:
        settings: the cluster's own.
        config: the file whose sections its services will read, if any.

    Raises:
        ConfigError: a setting is wrong; names it and what would be right.
        StartError: the file of API keys can not be read.
        CycloptsError: a service would refuse a value in its section or its environment variables.
    """
    _check_own(settings)
    load_keys(_parsed("gateway", config).api_keys)
    for setting in ("backend", "prefill_backend", "decode_backend"):
        _check_backend(setting, getattr(settings, setting))
    with contextlib.ExitStack() as held:
        # Held until all are bound, so that two that are the same are found.
        for setting, address in (*_doors(settings, config), *_metrics(settings, config)):
            held.enter_context(_bound(setting, address))


def doors(settings: UpConfig, config: Path | None) -> dict[str, str]:
    """Where the gateway is to listen, by the name of the door."""
    return {setting.rpartition(" ")[2].lstrip("-"): address for setting, address in _doors(settings, config)}


def metrics(config: Path | None) -> dict[str, str]:
    """Where services behind the gateway tell their metrics, of those whose section or own variable says it.

    The variable of all services, `PENSTOCK_METRICS`, is the gateway's here: one address can not be that of several.
    """
    told = {}
    for service in SERVICES:
        if service != "gateway":
            keys = {field.name for field in fields(_parsed(service, config))}
            section = read_file(config, service, SERVICES, keys) if config else {}
            own = os.environ.get(f"{ENVIRONMENT_PREFIX}{service.upper()}_METRICS") or section.get("metrics")
            if own:
                told[service] = str(own)
    return told


def _doors(settings: UpConfig, config: Path | None) -> Iterator[tuple[str, str]]:
    """By setting: what was said to the cluster, then what the gateway's own section and variables say."""
    own, theirs = settings.own(("http", "grpc")), _parsed("gateway", config)
    for door in ("http", "grpc"):
        address = getattr(theirs, door)
        if door in own or address == getattr(UpConfig, door):
            yield f"--{door}", getattr(settings, door)
        else:
            yield f"gateway: {door}", address


def _check_own(settings: UpConfig) -> None:
    executors = sum(settings.pools.values())
    for name in (*_POSITIVE, *_NOT_NEGATIVE):
        value = getattr(settings, name)
        if value is not None and (not 0 <= value < math.inf or (value == 0 and name in _POSITIVE)):
            least = "above 0" if name in _POSITIVE else "0 or more"
            raise ConfigError(f"--{name.replace('_', '-')}: must be {least}, and is {value}")
    if settings.threads is not None and settings.threads < executors:
        raise ConfigError(f"--threads: {executors} executors need at least one each, and there are {settings.threads}")
    if settings.served_name is not None and (not settings.served_name or "=" in settings.served_name):
        raise ConfigError(f"--served-name: must be a name without '=', and is {settings.served_name!r}")


def _check_backend(setting: str, name: str | None) -> None:
    from penstock.backends.discovery import sources
    from penstock.backends.registry import AUTO

    if name not in {None, AUTO} and name not in (known := sources()):
        raise ConfigError(f"--{setting.replace('_', '-')}: must be auto or one of {', '.join(known)}, and is {name!r}")


def _metrics(own: UpConfig, config: Path | None) -> Iterator[tuple[str, str]]:
    """Where services tell their metrics, by setting."""
    gateway, executors = _parsed("gateway", config).metrics, sum(own.pools.values())
    for service, address in {**({"gateway": gateway} if gateway else {}), **metrics(config)}.items():
        if service == "executor" and executors > 1 and not address.endswith(":0"):
            free = address.rpartition(":")[0] + ":0"
            raise ConfigError(
                f"executor: metrics: {executors} executors can not share {address}; {free} gives each a port of its own"
            )
        yield f"{service}: metrics", address


def _parsed(service: str, config: Path | None) -> Any:
    from penstock.cli.app import app

    tokens = [service, *(["--config", str(config)] if config else [])]
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    bound.apply_defaults()
    return bound.arguments["settings"]


@contextlib.contextmanager
def _bound(setting: str, address: str) -> Iterator[None]:
    """Listen on an address for a moment, as the service will: with SO_REUSEADDR, without SO_REUSEPORT."""
    try:
        host, port = host_and_port(address)
        host = host.strip("[]")
        bound = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, ValueError) as error:
        why = str(error.strerror).partition(" (while")[0] if isinstance(error, OSError) else error
        raise ConfigError(f"{setting}: can not listen on {address}: {why}") from error
    with bound:
        yield
