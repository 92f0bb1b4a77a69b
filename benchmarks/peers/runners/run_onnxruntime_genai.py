"""ONNX Runtime GenAI: the model as its own builder makes it, prompts of equal length as one batch. int4."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
from serving import Arguments, Loaded, serve, told


def built(arguments: Arguments) -> Path:
    """The model as ONNX, made once."""
    folder = arguments.converted / arguments.precision
    if not (folder / "genai_config.json").exists():
        told(f"building {folder} from {arguments.model}")
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(arguments.model), "-o", str(folder)]
        subprocess.run([*command, "-p", arguments.precision, "-e", "cpu", "-c", str(folder / "cache")], check=True)
    return folder


def load(arguments: Arguments) -> Loaded:
    if arguments.precision != "int4":
        raise ValueError(f"precision {arguments.precision}: this runner knows int4")
    model = genai.Model(str(built(arguments)))

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        ids = np.array(prompts, dtype=np.int32)
        length = ids.shape[1] + new_tokens
        parameters = genai.GeneratorParams(model)
        # The least length keeps the end-of-sequence token from being drawn before the last.
        parameters.set_search_options(batch_size=len(prompts), min_length=length, max_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        return [len(generator.get_sequence(i)) - ids.shape[1] for i in range(len(prompts))]

    return Loaded(genai.__version__, run, "its builder's int4")


if __name__ == "__main__":
    serve(load)
