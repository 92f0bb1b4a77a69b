"""``python -m penstock.cli``: the same as ``penstock``."""

from penstock.cli.app import main

main()
