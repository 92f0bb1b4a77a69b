"""Print what a service that computes nothing needs: the project's dependencies without those of its backends.

python tools/service_requirements.py pyproject.toml
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# Imported by backends alone; an image of a gateway, tokenizer or scheduler is three times smaller without them.
_OF_BACKENDS = frozenset({"openvino"})


def main() -> None:
    project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if name is not None and name.group() not in _OF_BACKENDS:
            print(requirement)


if __name__ == "__main__":
    main()
