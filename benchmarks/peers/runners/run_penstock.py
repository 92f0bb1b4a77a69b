"""Penstock's engine in one process, with its scheduler and sampler and no service around it; runs in the project's environment.

PRECISION is ``BACKEND/DTYPE``, ``openvino/int8`` for example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from serving import Arguments, Loaded, serve

from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.options import DTypeName
from penstock.cli.bench.scenarios import Request
from penstock.cli.huge_pages import start_again_with_huge_pages


def load(arguments: Arguments) -> Loaded:
    backend, dtype = arguments.precision.split("/")
    options = EngineOptions(backend=backend, dtype=cast("DTypeName", dtype), kv_cache_gib=4, prefix_cache=False)
    engine = EngineTarget(str(arguments.model), options)

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        timelines = engine.run([Request(list(ids), new_tokens) for ids in prompts], lambda: None)
        for error in (t.error for t in timelines if t.error is not None):
            raise RuntimeError(error)
        return [len(t.ids) for t in timelines]

    told = engine.description
    return Loaded(told.version, run, f"{told.backend}, {told.dtype}")


if __name__ == "__main__":
    start_again_with_huge_pages()  # as the suite's executor does
    serve(load)
