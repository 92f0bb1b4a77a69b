"""OpenVINO GenAI: continuous batching, its own defaults but for the prefix cache, which is off. bf16, int8, int4."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from serving import Arguments, Loaded, serve, told

# bfloat16 weights are exported as float16, which the compiled graph holds and computes as bfloat16 by its hint.
_WEIGHT_FORMATS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}


def exported(arguments: Arguments) -> Path:
    """The model as optimum-intel exports it, made once."""
    folder = arguments.converted / arguments.precision
    if not (folder / "openvino_model.xml").exists():
        told(f"exporting {arguments.model} to {folder}")
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino", "-m", str(arguments.model)]
        task = ["--task", "text-generation-with-past", "--weight-format", _WEIGHT_FORMATS[arguments.precision]]
        subprocess.run([*command, *task, str(folder)], check=True)
    return folder


def load(arguments: Arguments) -> Loaded:
    config = genai.SchedulerConfig()
    config.cache_size, config.max_num_batched_tokens, config.max_num_seqs = 4, 2048, 64
    config.enable_prefix_caching = False
    hints = {"INFERENCE_PRECISION_HINT": "bf16"} if arguments.precision == "bf16" else {}
    pipeline = genai.ContinuousBatchingPipeline(str(exported(arguments)), config, "CPU", hints)

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        generation = genai.GenerationConfig()
        generation.max_new_tokens, generation.ignore_eos, generation.do_sample = new_tokens, True, False
        inputs = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [generation] * len(inputs))
        return [len(result.m_generation_ids[0]) for result in results]

    return Loaded(genai.__version__, run, f"hints {hints or 'none'}, batches of 2048 tokens")


if __name__ == "__main__":
    serve(load)
