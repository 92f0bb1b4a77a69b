"""Penstock's side of a comparison, FOLDER DTYPE [BACKEND]: its engine and sampler in this process; greedy, no prefix cache."""

from __future__ import annotations

import sys

from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.options import DTypeName
from penstock.cli.bench.scenarios import Request
from penstock.cli.huge_pages import start_again_with_huge_pages
from workload import serve


def main() -> None:
    start_again_with_huge_pages()
    folder: str = sys.argv[1]
    dtype: DTypeName = sys.argv[2]  # type: ignore[assignment]  # what engine_vs_genai.py accepts
    backend = sys.argv[3] if len(sys.argv) > 3 else "openvino"
    engine = EngineTarget(folder, EngineOptions(backend=backend, dtype=dtype, kv_cache_gib=4, prefix_cache=False))

    def run(work: list[list[int]], new: int) -> None:
        failed = [t.error for t in engine.run([Request(prompt, new) for prompt in work], lambda: None) if t.error]
        if failed:
            raise SystemExit(failed[0])

    serve(run)
    engine.close()


if __name__ == "__main__":
    main()
