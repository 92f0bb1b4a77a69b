"""Settings from a file and from the environment; a key that nothing reads is an error that names the nearest right one.

The command line lays them over one another: flags over ``PENSTOCK_<COMMAND>_<KEY>`` over ``PENSTOCK_<KEY>`` over the file over
defaults.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENT_PREFIX",
    "ConfigError",
    "check_environment",
    "check_keys",
    "nearest",
    "read_file",
    "sections_of",
    "spelled",
    "variables",
]

ENVIRONMENT_PREFIX = "PENSTOCK_"

# Kubernetes sets such variables for a Service named penstock-gateway in every pod of its namespace.
_SERVICE_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z")


class ConfigError(Exception):
    """A setting is wrong: one line, for the person who wrote it."""


def spelled(key: str) -> str:
    """A key as the fields spell it: ``max-batch-size`` and ``max_batch_size`` are the same."""
    return key.strip("-").replace("-", "_").lower()


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that is most like this one; None where none is."""
    found = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def check_keys(keys: Iterable[str], known: Collection[str], where: str) -> None:
    """Refuse the first key that is not known.

    Raises:
        ConfigError: names the key, where it stands, and the nearest right one, or all of them where none is near.
    """
    for key in keys:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown setting {key}; {hint}")


def variables(command: str, keys: Iterable[str]) -> set[str]:
    """The environment variables that stand for a command's keys, its own and those shared by all commands."""
    prefixes = (f"{ENVIRONMENT_PREFIX}{command.upper()}_", ENVIRONMENT_PREFIX)
    return {prefix + key.upper() for prefix in prefixes for key in keys}


def check_environment(environment: Iterable[str], known: Collection[str]) -> None:
    """Refuse the first ``PENSTOCK_`` variable that no command reads.

    Raises:
        ConfigError: names the variable and the nearest right one.
    """
    ours = (name for name in sorted(environment) if name.startswith(ENVIRONMENT_PREFIX) and not _SERVICE_LINK.search(name))
    for name in ours:
        if name not in known:
            near = nearest(name, known)
            raise ConfigError(f"environment: nothing reads {name}" + (f"; did you mean {near}?" if near else ""))


def read_file(path: Path, section: str, sections: Collection[str], known: Collection[str]) -> dict[str, Any]:
    """A command's settings from a YAML file.

    A file with keys named like services holds a section for each: a service reads its own alone, and what stands beside the
    sections belongs to the command that is no section (``up``). A file without sections belongs to whoever reads it.

    Args:
        path: the file.
        section: the name of the command that asks.
        sections: names of all services.
        known: keys that the command has, as `spelled` tells them.

    Raises:
        ConfigError: the file can not be read, is no mapping, or holds an unknown key, or one twice.
    """
    values = _mapping(_load(path), str(path))
    found = [name for name in values if name in sections]
    for name in found:
        _mapping(values[name], f"{path}: {name}")
    if not found:
        own, where = values, str(path)
        known = {*known, *sections}  # none stands there, but one may be misspelt
    elif section in sections:
        own, where = dict(values.get(section) or {}), f"{path}: {section}"
    else:
        own, where = {key: value for key, value in values.items() if key not in sections}, str(path)
        known = {*known, *sections}
    own = {spelled(str(key)): value for key, value in own.items()}
    check_keys(own, known, where)
    return own


def _load(path: Path) -> object:
    import yaml

    class Once(yaml.SafeLoader):
        """Takes no key twice, of which YAML's own loader keeps the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                name = spelled(str(key.value))
                if name in seen:
                    raise ConfigError(f"{path}: line {key.start_mark.line + 1}: {name} stands there twice; leave one of them out")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Once)  # noqa: S506 - it is a safe loader
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _mapping(value: object, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: must be a mapping of settings, and is a {type(value).__name__}")
    return value


def sections_of(path: Path, sections: Collection[str]) -> set[str]:
    """The services for which a file holds a section.

    Raises:
        ConfigError: the file can not be read or is no mapping.
    """
    return {name for name in _mapping(_load(path), str(path)) if name in sections}
