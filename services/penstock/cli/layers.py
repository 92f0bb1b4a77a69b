"""Where a command's settings come from: flags over ``PENSTOCK_<COMMAND>_…`` over ``PENSTOCK_…`` over ``--config`` over defaults."""

from __future__ import annotations

import os
from pathlib import Path

from cyclopts import App, ArgumentCollection
from cyclopts.config import Dict, Env

from penstock.common.config import ENVIRONMENT_PREFIX, check_environment, read_file, spelled, variables

__all__ = ["CONFIG_LAYERS", "SERVICES"]

SERVICES = ("gateway", "tokenizer", "scheduler", "executor")

# What belongs to a start rather than to a setting.
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
    path = file.tokens[0].value
    values = read_file(Path(path), commands[-1], SERVICES, _keys(arguments))
    # Under its commands' names: of flat values, cyclopts drops those named like a command, such as the executor's `scheduler`.
    for command in reversed(commands):
        values = {command: values}
    Dict(values, source=path)(app, commands, arguments)


def _keys(arguments: ArgumentCollection) -> set[str]:
    return {spelled(argument.name) for argument in arguments if argument.name.startswith("--")} - _NOT_SETTINGS


CONFIG_LAYERS = (
    _environment_is_known,
    Env(ENVIRONMENT_PREFIX, source="the environment"),
    Env(ENVIRONMENT_PREFIX, source="the environment", command=False, show=False),
    _config_file,
)
