"""What every service's command takes beside the service's own settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

__all__ = ["Start"]


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a service's process is started.

    Attributes:
        config: YAML file of these settings, or of a section per service, named like the commands.
        process: Name of the process among those of its supervisor; stands in its log lines where they are JSON.
        supervisor_fd: Descriptor of a pipe; the process ends when its other end closes.
        faults: Folder of the rules by which a test has the process fail, as `penstock.common.faults` tells.
    """

    config: Path | None = None
    process: Annotated[str | None, Parameter(show=False)] = None
    supervisor_fd: Annotated[int | None, Parameter(show=False)] = None
    faults: Annotated[Path | None, Parameter(show=False)] = None
