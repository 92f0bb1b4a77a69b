"""llama.cpp by its C API: one context, a sequence for each request, all of them in one batch a step. bf16, q8_0, q4_0.

Its own loop is written here, since llama.cpp has none for several sequences outside its server: prompts by `n_batch` tokens, then a
step for all sequences at once, the next token of each being the one with the greatest logit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path

import llama_cpp as api
import numpy as np
from gguf_file import write_gguf
from serving import Arguments, Loaded, cores, serve, told

_MAX_SEQUENCES, _CONTEXT, _BATCH = 32, 16_384, 2048

# A token, its position, its sequence, and whether logits are wanted after it.
Row = tuple[int, int, int, bool]


def converted(arguments: Arguments) -> Path:
    """The model as GGUF, made once."""
    path = arguments.converted / f"{arguments.precision}.gguf"
    if not path.exists():
        told(f"converting {arguments.model} to {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        write_gguf(arguments.model, unfinished, arguments.precision)
        unfinished.replace(path)
    return path


class Decoder:
    """One model in one context."""

    def __init__(self, path: Path) -> None:
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = api.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_seq_max = _CONTEXT, _BATCH, _MAX_SEQUENCES
        parameters.n_threads = parameters.n_threads_batch = cores()
        parameters.kv_unified = True
        self._context = api.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError(f"llama.cpp gives no context of {_CONTEXT} tokens")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        last = [0] * len(prompts)
        for batch in _batches(prompts):
            self._step(batch, last)
        counts = [1] * len(prompts)
        for k in range(new_tokens - 1):
            self._step([(last[s], len(ids) + k, s, True) for s, ids in enumerate(prompts)], last)
            counts = [count + 1 for count in counts]
        return counts

    def _step(self, rows: Sequence[Row], last: list[int]) -> None:
        """Compute one batch, and note the greatest logit's token of each sequence that wants one."""
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode of {len(rows)} rows gave {code}")
        for i, (_, _, sequence, wanted) in enumerate(rows):
            if wanted:
                logits = ctypes.cast(api.llama_get_logits_ith(self._context, i), ctypes.POINTER(ctypes.c_float))
                last[sequence] = int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax())
        api.llama_batch_free(batch)


def _batches(prompts: Sequence[Sequence[int]]) -> Iterable[list[Row]]:
    """The prompts end to end, cut into batches that llama.cpp takes."""
    rows = [(token, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, token in enumerate(ids)]
    for start in range(0, len(rows), _BATCH):
        yield rows[start : start + _BATCH]


def load(arguments: Arguments) -> Loaded:
    decoder = Decoder(converted(arguments))
    return Loaded(f"llama-cpp-python {api.__version__}", decoder.run, api.llama_print_system_info().decode().strip())


if __name__ == "__main__":
    serve(load)
