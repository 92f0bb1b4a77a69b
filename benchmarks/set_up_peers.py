"""Environments for the peers of `against_peers.py`: one each, from pinned requirements.

    python benchmarks/set_up_peers.py [--peers .peers] [--peer NAME …]

What is installed already is left alone. A peer that can not be installed is named with its reason, and the others go on; exits with
1 where none could be. llama-cpp is built from source: it needs a C++ compiler, and minutes. All five take about 12 GB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from peers.catalog import PEERS
from peers.environments import set_up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="folder for environments and converted models")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="which; all without it")
    arguments = parser.parse_args()
    names = arguments.peer or list(PEERS)
    if len(set_up(names, arguments.peers.resolve())) == len(names):
        raise SystemExit("no peer could be installed")


if __name__ == "__main__":
    main()
