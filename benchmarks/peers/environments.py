"""An environment for each peer, made once from its pinned requirements."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from peers.catalog import PEERS, Peer

__all__ = ["Environment", "set_up"]

# Where the processor-only build of torch is. Elsewhere torch comes with gigabytes of CUDA libraries.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"

# They come along with others. PyPI's are built for its CUDA torch and break the import of transformers beside a processor-only one;
# no model of text needs them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Environment:
    """A peer's part of the folder that all peers share: its interpreter, its logs and what it converts."""

    peer: Peer
    folder: Path

    @classmethod
    def of(cls, peer: str, peers: Path) -> Environment:
        """Where a peer lives, installed or not."""
        return cls(PEERS[peer], peers / peer)

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def converted(self) -> Path:
        """Checkpoints in the peer's own format."""
        return self.folder / "converted"

    @property
    def log(self) -> Path:
        """What the installation said."""
        return self.folder / "install.log"

    @property
    def installed(self) -> bool:
        """Whether what the requirements ask for now has been installed."""
        return self._mark.exists() and self._mark.read_text() == self._wanted()

    @property
    def _mark(self) -> Path:
        return self.folder / "installed"

    def _wanted(self) -> str:
        return hashlib.sha256(self.peer.requirements.read_bytes()).hexdigest()

    def install(self) -> str | None:
        """Make the environment anew; why it could not be made, or None."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mark.unlink(missing_ok=True)
        venv.create(self.folder / "venv", with_pip=True, clear=True)
        torch = [line for line in self.peer.requirements.read_text().splitlines() if line.startswith("torch==")]
        # torch first and alone: the index that it comes from is asked for nothing else.
        steps = [["install", "--retries", "0", "--no-deps", "--extra-index-url", TORCH_INDEX, *torch]] if torch else []
        steps += [["install", "-r", str(self.peer.requirements)], ["uninstall", "--yes", *UNWANTED]]
        with self.log.open("w") as log:
            for step in steps:
                command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *step]
                if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                    return _last_error(self.log)
        self._mark.write_text(self._wanted())
        return None


def set_up(names: list[str], peers: Path) -> dict[str, str]:
    """Install what is not installed, telling what is done; why each that could not be installed was not."""
    failed: dict[str, str] = {}
    for at, name in enumerate(names, 1):
        environment = Environment.of(name, peers)
        head = f"[{at}/{len(names)}] {name}"
        if environment.installed:
            print(f"{head}: installed", file=sys.stderr, flush=True)
            continue
        print(f"{head}: installing into {environment.folder}, log in {environment.log}", file=sys.stderr, flush=True)
        reason = environment.install()
        if reason is not None:
            failed[name] = reason
        print(f"{head}: {'NOT installed: ' + reason if reason else 'installed'}", file=sys.stderr, flush=True)
    return failed


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.strip().lower().startswith("error")]
    return (errors or lines or ["pip said nothing"])[-1].strip()
