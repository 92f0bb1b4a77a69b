"""Print what an image's layer of dependencies holds: the project's own, with or without those of its backends.

python tools/service_requirements.py pyproject.toml [--backends]
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

# Imported by backends alone; an image of a gateway, tokenizer or scheduler is three times smaller without them.
_OF_BACKENDS = frozenset({"openvino"})


def main() -> None:
    file, *flags = sys.argv[1:]
    project = tomllib.loads(Path(file).read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[A-Za-z0-9._-]+", requirement)
        if "--backends" in flags or (name is not None and name.group() not in _OF_BACKENDS):
            print(requirement)


if __name__ == "__main__":
    main()
