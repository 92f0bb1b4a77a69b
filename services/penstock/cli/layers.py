"""Where a command's settings come from: flags over ``PENSTOCK_<COMMAND>_…`` over ``PENSTOCK_…`` over ``--config`` over defaults."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from cyclopts import App, ArgumentCollection, CoercionError, CycloptsError, UnknownOptionError
from cyclopts.config import Dict, Env

from penstock.common.config import ENVIRONMENT_PREFIX, ConfigError, check_environment, read_file, sections_of, spelled, variables

__all__ = ["CONFIG_LAYERS", "SERVICES", "wrong_setting"]

SERVICES = ("gateway", "tokenizer", "scheduler", "executor")

# What belongs to a start rather than to a setting.
_ENVIRONMENT = "environment"
_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
_FRACTION = re.compile(r"\d\.|\.\d")
_NOT_SETTINGS = {"help", "version", "config", "process", "supervisor_fd", "faults"}


def _environment_is_known(app: App, commands: tuple[str, ...], _: ArgumentCollection) -> None:
    """Refuse a variable that no command reads. Only where there is one are all commands imported to tell."""
    ours = [name for name in os.environ if name.startswith(ENVIRONMENT_PREFIX)]
    if ours:
        check_environment(ours, _all_variables(app.app_stack.current_frame[0], commands[:0]))


def _all_variables(app: App, path: tuple[str, ...]) -> set[str]:
    known: set[str] = set()
    if app.default_command is not None and path:
        keys = _keys(app.assemble_argument_collection()) | {"config", "faults"}
        known |= variables("_".join(path), keys)
    for name, command in app.resolved_commands().items():
        if not name.startswith("-"):
            known |= _all_variables(command, (*path, name.replace("-", "_")))
    return known


def _config_file(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Read the file that ``--config`` or its variable names."""
    file = arguments.get("--config", None)
    if file is None or not file.tokens:
        return
    if not file.tokens[0].value:
        raise ConfigError("--config or PENSTOCK_CONFIG is empty: name a file, or leave it away")
    path = Path(file.tokens[0].value)
    values = read_file(path, commands[-1], SERVICES, _keys(arguments))
    where = f"{path}: {commands[-1]}" if commands[-1] in sections_of(path, SERVICES) else str(path)
    # Under its commands' names: of flat values, cyclopts drops those named like a command, such as the executor's `scheduler`.
    for command in reversed(commands):
        values = {command: values}
    Dict(values, source=where)(app, commands, arguments)


def _whole_numbers_are_whole(_: App, __: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Refuse 1.5 where a whole number belongs, which cyclopts would round."""
    for argument in arguments:
        if int in {argument.hint, *get_args(argument.hint)}:
            for token in argument.tokens:
                if _FRACTION.search(token.value):
                    raise CoercionError(token=token, argument=argument, target_type=int)


def wrong_setting(error: CycloptsError) -> ConfigError | None:
    """What is wrong with a value that comes from a file or the environment; None where the command line itself is wrong."""
    if not isinstance(error, CoercionError | UnknownOptionError) or (token := error.token) is None or token.source in {"", "cli"}:
        return None
    key = (token.keyword or "").partition("]")[0].removeprefix("[")  # of a mapping where there should be none, [key][inner]
    if isinstance(error, UnknownOptionError):
        return ConfigError(f"{token.source}: {key}: must be no mapping")
    return ConfigError(f"{token.source}: {key}: must be {_right(error.target_type)}, and is {token.value or 'empty'}")


def _right(kind: Any) -> str:
    """What a value of this type is, for a person."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if isinstance(kind, UnionType):
        return " or ".join(_right(one) for one in get_args(kind) if one is not NoneType)
    return _KINDS.get(kind, f"a {getattr(kind, '__name__', kind)}")


def _keys(arguments: ArgumentCollection) -> set[str]:
    return {spelled(argument.name) for argument in arguments if argument.name.startswith("--")} - _NOT_SETTINGS


CONFIG_LAYERS = (
    _environment_is_known,
    Env(ENVIRONMENT_PREFIX, source=_ENVIRONMENT),
    Env(ENVIRONMENT_PREFIX, source=_ENVIRONMENT, command=False, show=False),
    _config_file,
    _whole_numbers_are_whole,
)
