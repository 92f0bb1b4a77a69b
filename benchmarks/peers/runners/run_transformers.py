"""Transformers' own `generate`, prompts of equal length as one batch. bf16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers
from serving import Arguments, Loaded, cores, serve


def load(arguments: Arguments) -> Loaded:
    if arguments.precision != "bf16":
        raise ValueError(f"precision {arguments.precision}: this runner knows bf16")
    torch.set_num_threads(cores())
    model = transformers.AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # nothing ends an answer but its length

    @torch.inference_mode()
    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        answers = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
        return [answers.shape[1] - ids.shape[1]] * len(prompts)

    version = f"{transformers.__version__} (torch {torch.__version__})"
    return Loaded(version, run, f"attention {model.config._attn_implementation}")  # noqa: SLF001 - no other name for it


if __name__ == "__main__":
    serve(load)
