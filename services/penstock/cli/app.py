"""`penstock`: a command's module is imported when the command runs, so that help is quick and clients need no numpy."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, Group, Parameter, UnknownOptionError, env_var_split

from penstock.cli.grpc_threads import with_fewer_threads
from penstock.cli.huge_pages import computes, start_again_with_huge_pages
from penstock.cli.interrupts import at_once
from penstock.cli.layers import CONFIG_LAYERS, wrong_setting
from penstock.common.config import ConfigError
from penstock.common.service import StartError

__all__ = ["app", "main"]

_LOCAL = Group("Serve", sort_key=0)
_CLIENTS = Group("Use", sort_key=1)
_SERVICES = Group("Single services", sort_key=2)

# What writing to a file that is open already fails with, where its disk or its quota is full or broken.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def _split(kind: Any, text: str, *, delimiter: str | None = None) -> list[str]:
    """A list in an environment variable stands between commas."""
    return env_var_split(kind, text, delimiter=delimiter or ",")


app = App(
    name="penstock",
    help="Self-hosted inference: small gRPC services and pluggable hardware backends.",
    version=lambda: version("penstock"),
    default_parameter=Parameter(negative_iterable=(), env_var_split=_split),
    config=CONFIG_LAYERS,
    help_format="plaintext",
)

app.command("penstock.cli.up:up", name="up", group=_LOCAL, help="Serve a model on this machine: all services, supervised.")
app.command("penstock.cli.scale:scale", name="scale", group=_LOCAL, help="More or fewer executors for what up started.")
app.command("penstock.cli.role:role", name="role", group=_LOCAL, help="Another role for a live executor.")
app.command("penstock.cli.backends:backends", name="backends", group=_LOCAL, help="What can run models here, or why it can not.")
app.command(
    "penstock.cli.calibrate:calibrate",
    name="calibrate",
    group=_LOCAL,
    help="How fast each backend is with a model here; auto goes by it.",
)
app.command(
    "penstock.cli.conformance:conformance", name="conformance", group=_LOCAL, help="Hold a backend against what all have to do."
)
app.command(
    "penstock.cli.parity.command:parity", name="parity", group=_LOCAL, help="Hold prefill and decode apart against together."
)
app.command("penstock.cli.generate:generate", name="generate", group=_CLIENTS, help="Continue a prompt.")
app.command("penstock.cli.chat:chat", name="chat", group=_CLIENTS, help="Talk with a model.")
app.command("penstock.cli.models:models", name="models", group=_CLIENTS, help="The models that are served.")
app.command("penstock.cli.health:health", name="health", group=_CLIENTS, help="Whether a service is serving, by gRPC health.")
if find_spec("penstock.cli.bench") is not None:
    app.command("penstock.cli.bench:app", name="bench", group=_CLIENTS, help="Measure an engine or a suite.")
app.command("penstock.cli.services:gateway", name="gateway", group=_SERVICES, help="The door: gRPC and OpenAI's HTTP API.")
app.command("penstock.cli.services:tokenizer", name="tokenizer", group=_SERVICES, help="Text to token ids and back.")
app.command("penstock.cli.services:scheduler", name="scheduler", group=_SERVICES, help="Where and when requests run.")
app.command("penstock.cli.services:executor", name="executor", group=_SERVICES, help="Runs one model on one backend.")


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, who does not want it
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for as long as the process lives
    os.environ.update(with_fewer_threads(os.environ))
    # gRPC's core writes lines of its own to stderr, among ours; what matters of them is in the errors that it raises.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if computes(sys.argv[1:]):
        start_again_with_huge_pages()
    sys.exit(_run())


def _run() -> int:
    try:
        with at_once():  # the command's own imports
            command, bound, _ = app.parse_args(sys.argv[1:], exit_on_error=False, print_error=False)
        status = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        wrong = wrong_setting(error)
        return _refuse(_misread(error, sys.argv[1:]), 2) if wrong is None else _refuse(str(wrong), 1)
    except (ConfigError, StartError) as error:
        return _refuse(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _drop_output()
        return 141
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _drop_output()
        return _refuse(f"can not write the output: {error.strerror}", 1)
    return status if isinstance(status, int) else 0


def _misread(error: CycloptsError, arguments: Sequence[str]) -> str:
    """What is wrong with the arguments. Behind -- nothing is an option, and cyclopts calls what looks like one unknown."""
    behind = arguments[arguments.index("--") + 1 :] if "--" in arguments else ()
    option = error.token.keyword if isinstance(error, UnknownOptionError) else None
    if option is not None and option in {argument.partition("=")[0] for argument in behind}:
        return f"{option}: stands behind --, where nothing is an option; put it before"
    return str(error)


def _drop_output() -> None:
    """Let what is still to be printed go nowhere: the interpreter would fail at it once more when it ends."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _refuse(why: str, status: int) -> int:
    print(f"penstock: {' '.join(why.split())}", file=sys.stderr)
    return status
