"""What was proven of the devices that the installed runtime names: asked in a process of its own, once.

A provider that is tried takes memory of its device, loads libraries that may not fit the driver, and may end the process.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from penstock.backends.contract import DType

__all__ = ["Proof", "proofs", "read"]

# Less than a backend has to say what it is.
_SECONDS = 15.0


@dataclass(slots=True)
class Proof:
    """What a device computed.

    Attributes:
        faults: by type of weights, in the order of preference: None, or why it does not compute with them.
        printed: the last that the runtime said, which is where it tells of libraries that it could not load.
    """

    faults: dict[DType, str | None] = field(default_factory=dict)
    printed: str = ""

    @property
    def dtypes(self) -> tuple[DType, ...]:
        """Types of weights that it computes with, the preferred one first."""
        return tuple(dtype for dtype, fault in self.faults.items() if fault is None)

    @property
    def fault(self) -> str:
        """Why it computes with none."""
        reasons: dict[str, list[str]] = {}
        for dtype, fault in self.faults.items():
            reasons.setdefault(fault or "", []).append(dtype)
        why = "; ".join(f"{', '.join(dtypes)}: {reason}" for reason, dtypes in reasons.items())
        return f"{why}; it printed: {self.printed}" if self.printed else why


@functools.cache
def proofs() -> Mapping[str, Proof]:
    """The proof of each device that the installed runtime names beside the CPU, best first; runs a process at the first call."""
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as said:
        argv = [sys.executable, "-P", "-m", "penstock.backends.onnxruntime.proving", str(answers.fileno())]
        try:
            # What the runtime prints must not spoil the answer.
            status = subprocess.run(  # noqa: S603  this interpreter and a module of this package
                argv,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                pass_fds=(answers.fileno(),),
                timeout=_SECONDS,
                check=False,
            ).returncode
            end = f"the process that tried it ended with {status}" if status else ""
        except subprocess.TimeoutExpired:
            end = f"no answer within {_SECONDS:g} s"
        answers.seek(0)
        said.seek(0)
        printed = said.read().decode(errors="replace").strip().splitlines()
        return read(answers.read().splitlines(), end, printed[-1] if printed else "")


def read(lines: Iterable[bytes], end: str, printed: str = "") -> Mapping[str, Proof]:
    """Proofs from what was told: each trial twice, when it begins and when its outcome is known.

    Args:
        lines: JSON.
        end: how the process ended before its time, which is the fault of a trial that it left open; empty: it did not.
        printed: the last that it said otherwise.
    """
    found: dict[str, Proof] = {}
    for line in lines:
        try:
            trial = json.loads(line)
        except ValueError:  # cut off
            break
        found.setdefault(trial["device"], Proof(printed=printed)).faults[DType(trial["dtype"])] = trial.get("fault", end)
    return found if found or not end else {"accelerators": Proof(dict.fromkeys(DType, end), printed)}
