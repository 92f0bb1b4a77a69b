"""What rounding costs in quality: each type of weights, and of the KV cache, against float32 on the same text.

    python quantisation_quality.py                              # the built-in model, on text that its corpus never held
    python quantisation_quality.py FOLDER --text FILE...        # a checkpoint with its own tokenizer, on these files

A line of JSON a type: perplexity and its change, the share of tokens at which the likeliest next one is the same, and the mean
Kullback-Leibler divergence from float32's distribution, in nats.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from measuring import report
from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.driver import ALL, Driver, Piece
from penstock.backends.contract import DeviceConfig, DType, GenerativeModel, ModelSpec
from penstock.backends.registry import backends
from penstock.common.service import StartError
from penstock.common.sources import resolve

WINDOW = 512
CHUNK = 128
# Of weights, and of the KV cache; None: the type that is computed with.
TYPES: Sequence[tuple[DType, DType | None]] = (
    (DType.BF16, None),
    (DType.INT8, None),
    (DType.INT4, None),
    (DType.F32, DType.INT8),
    (DType.INT8, DType.INT8),
    (DType.INT4, DType.INT8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="builtin")
    parser.add_argument("--text", type=Path, nargs="+", help="files of text; the built-in model's kind where absent")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, at most")
    parser.add_argument("--backend", default="openvino")
    options = parser.parse_args()
    folder = resolve(options.model)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = (path.read_text(encoding="utf-8") for path in options.text) if options.text else _unseen()
    windows = list(_windows(tokenizer, texts, options.tokens))
    spec = read_model(folder, options.model)
    exact = _create(options.backend, spec, DType.F32, None)
    for dtype, kv in TYPES:
        name = f"{options.model}: {dtype} weights, {kv or 'computed'} KV"
        try:
            rounded = _create(options.backend, spec, dtype, kv)
        except StartError as error:  # not every backend has every type
            report(name, {"not_measured": str(error)})
            continue
        figures = _compare(exact, rounded, windows)
        rounded.close()
        report(name, figures)


def _unseen() -> Iterator[str]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tools/builtin_model"))
    from corpus import documents  # beside the model's training, which is no package

    return documents(seed=20_000)  # training drew from other seeds


def _windows(tokenizer: Tokenizer, texts: Iterator[str], most: int) -> Iterator[list[int]]:
    taken = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids), WINDOW):
            window = ids[start : start + WINDOW][: most - taken]
            taken += len(window)
            if len(window) > 1:
                yield window
        if taken >= most:
            return


def _create(backend: str, spec: ModelSpec, dtype: DType, kv: DType | None) -> GenerativeModel:
    config = DeviceConfig(dtype=dtype, kv_cache_dtype=kv, kv_cache_bytes=256 << 20, max_batch_tokens=WINDOW)
    return backends()[backend].create(spec, config)


def _compare(exact: GenerativeModel, rounded: GenerativeModel, windows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Figures over all tokens but each window's first, which nothing stands before."""
    told = np.concatenate([part for ids in windows for part in _window(Driver(exact), Driver(rounded), ids)])
    right, found, same, divergence = told.mean(0)
    return {
        "tokens": len(told),
        "perplexity_f32": round(float(np.exp(-right)), 4),
        "perplexity": round(float(np.exp(-found)), 4),
        "perplexity_change_percent": round(float(np.expm1(right - found)) * 100, 3),
        "top1_agreement_percent": round(float(same) * 100, 2),
        "divergence_nats": round(float(divergence), 6),
    }


def _window(exact: Driver, rounded: Driver, ids: Sequence[int]) -> Iterator[NDArray[np.float64]]:
    """For each token of a chunk: log-probability by each, whether both would choose the same, and the divergence."""
    sequences = exact.sequence(), rounded.sequence()
    for start in range(0, len(ids) - 1, CHUNK):
        chunk, targets = ids[start : start + CHUNK], ids[start + 1 : start + CHUNK + 1]
        pieces = (driver.step(Piece(sequence, chunk, ALL))[0] for driver, sequence in zip((exact, rounded), sequences, strict=True))
        right, found = (_log_softmax(logits[: len(targets)]) for logits in pieces)
        rows = np.arange(len(targets)), np.array(targets)
        divergence = (np.exp(right) * (right - found)).sum(1)
        yield np.stack([right[rows], found[rows], right.argmax(1) == found.argmax(1), divergence], 1).astype(np.float64)
    for driver, sequence in zip((exact, rounded), sequences, strict=True):
        driver.release(sequence)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    shifted = logits - logits.max(1, keepdims=True)
    told: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return told


if __name__ == "__main__":
    main()
