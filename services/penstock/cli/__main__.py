"""The process of ``penstock`` and of ``python -m penstock.cli``. The command line is imported while Ctrl-C is quiet already."""

from __future__ import annotations

from penstock.cli.interrupts import at_once

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name, and exit with its status; 130 after Ctrl-C, also amid imports."""
    with at_once():
        from penstock.cli.app import main as run
    run()


if __name__ == "__main__":
    main()
