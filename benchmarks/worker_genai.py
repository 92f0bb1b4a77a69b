"""The peer of `engine_vs_genai.py`: OpenVINO GenAI, continuous batching, with its own defaults."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai

from workload import serve


def export(folder: str, dtype: str) -> str:
    exported = f"{folder}-openvino-{dtype}"
    if not Path(exported).exists():
        weights = {"bf16": "fp16"}.get(dtype, dtype)  # compiled to bfloat16 by the hint below
        command = ["optimum-cli", "export", "openvino", "-m", folder, "--task", "text-generation-with-past"]
        subprocess.run([*command, "--weight-format", weights, exported], check=True, stdout=sys.stderr)
    return exported


def main() -> None:
    folder, dtype = sys.argv[1:]
    config = genai.SchedulerConfig()
    config.cache_size, config.max_num_batched_tokens, config.max_num_seqs = 4, 2048, 64
    config.enable_prefix_caching = False
    hints = {"INFERENCE_PRECISION_HINT": "bf16"} if dtype == "bf16" else {}
    pipe = genai.ContinuousBatchingPipeline(export(folder, dtype), config, "CPU", hints)

    def run(work: list[list[int]], new: int) -> None:
        generation = genai.GenerationConfig()
        generation.max_new_tokens, generation.ignore_eos, generation.do_sample = new, True, False
        pipe.generate([ov.Tensor(np.array([ids], dtype=np.int64)) for ids in work], [generation] * len(work))

    serve(run)


if __name__ == "__main__":
    main()
