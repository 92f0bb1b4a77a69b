"""The roof of decoding one sequence: the bytes that a step has to read, and how fast this machine reads."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.onnxruntime.weights import BLOCKS
from penstock.cli.bench.scenarios import Scenario

__all__ = ["Probe", "bytes_read", "compiled_probe"]

_BF16, _F32 = 2, 4
_BYTES: Mapping[str, float] = {"int4": 0.5, "int8": 1, "bf16": _BF16, "f32": _F32}
# By backend, how rounded weights lie: values to a group of a row, and bytes of a group's scale, with a zero point where it has one.
_GROUPS: Mapping[tuple[str, str], tuple[int, int]] = {
    ("openvino", "int4"): (128, _F32 + 1),
    ("onnxruntime", "int4"): (BLOCKS[4], _F32),
    ("onnxruntime", "int8"): (BLOCKS[8], _F32),
}


class Probe:
    """The compiled `bandwidth.c`."""

    def __init__(self, program: Path) -> None:
        self._program = program

    def bytes_per_second(self) -> float:
        """Read bandwidth of all cores together."""
        threads = str(len(os.sched_getaffinity(0)))
        return float(subprocess.run([self._program, threads], check=True, capture_output=True, text=True).stdout)


def compiled_probe(folder: Path) -> Probe | None:
    """The probe, compiled for this processor; None where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    program, source = folder / "bandwidth", Path(__file__).with_name("bandwidth.c")
    subprocess.run([compiler, "-O3", "-march=native", "-pthread", str(source), "-o", str(program)], check=True)
    return Probe(program)


def bytes_read(decoder: DecoderSpec, backend: str, dtype: str, scenario: Scenario) -> int:
    """What has to be read for a scenario of one sequence: every weight and scale once a step, and the cache so far.

    The prompt counts as one step. Norms and biases are left out, the cache counts as 16 bits an element, and a tied embedding
    counts once, as the output projection: a lower bound, so that a share is never flattered.
    """
    layer = (
        (decoder.heads * decoder.head_dim, decoder.hidden_size),
        (decoder.kv_heads * decoder.head_dim, decoder.hidden_size),
        (decoder.kv_heads * decoder.head_dim, decoder.hidden_size),
        (decoder.hidden_size, decoder.heads * decoder.head_dim),
        (decoder.intermediate_size, decoder.hidden_size),
        (decoder.intermediate_size, decoder.hidden_size),
        (decoder.hidden_size, decoder.intermediate_size),
    )
    # OpenVINO's output projection stays at 8 bits where layers are at 4.
    wider = "int8" if (backend, dtype) == ("openvino", "int4") else dtype
    head = _matrix(decoder.vocabulary_size, decoder.hidden_size, backend, wider)
    weights = decoder.layers * sum(_matrix(rows, columns, backend, dtype) for rows, columns in layer) + head
    token = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim * _BF16
    cached = sum(scenario.prompt_tokens + k for k in range(scenario.new_tokens))
    return scenario.new_tokens * weights + cached * token


def _matrix(rows: int, columns: int, backend: str, dtype: str) -> int:
    values = int(rows * columns * _BYTES[dtype])
    if dtype not in {"int8", "int4"}:
        return values
    size, extra = _GROUPS.get((backend, dtype), (columns, _F32))
    return values + rows * columns // size * extra
