"""``python -m penstock.backends.conformance [NAME …]``: hold backends against the suite; exit 1 if one falls short."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from penstock.backends.conformance.subject import NotApplicable, Subject
from penstock.backends.conformance.suite import CHECKS, Check, subjects
from penstock.backends.contract import Available
from penstock.backends.registry import backends

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each check of each family; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m penstock.backends.conformance", description="Hold backends against the suite.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="backends; none: every one that is available")
    names = parser.parse_args(arguments).names
    known = backends()
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"there is no backend {unknown[0]}; there are {', '.join(known)}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names or [name for name, r in known.items() if isinstance(r.probe(), Available)]:
            for subject in subjects(known[name], Path(folder)):
                failed += sum(not _passes(subject, check_name, check) for check_name, check in CHECKS.items())
    return 1 if failed else 0


def _passes(subject: Subject, name: str, check: Check) -> bool:
    line = f"{subject.registration.name} {subject.dtype} {subject.spec.decoder.architecture} {name}"
    try:
        check(subject)
    except NotApplicable as reason:
        sys.stdout.write(f"skip  {line}: {reason}\n")
    except Exception as error:  # noqa: BLE001  whatever a backend raises is its failure, and the next check runs
        sys.stdout.write(f"FAIL  {line}: {type(error).__name__}: {error}\n")
        return False
    else:
        sys.stdout.write(f"ok    {line}\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
