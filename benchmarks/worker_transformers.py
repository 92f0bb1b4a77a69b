"""The peer of `torch_vs_transformers.py`: transformers' `generate`, greedy, the prompts of a scenario as one batch."""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from penstock.cli.huge_pages import start_again_with_huge_pages
from workload import serve

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


def main() -> None:
    start_again_with_huge_pages()  # as Penstock's side does
    folder, dtype = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    def run(work: list[list[int]], new: int) -> None:
        ids = torch.tensor(work)
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
            )
        if out.shape[1] != ids.shape[1] + new:
            raise SystemExit(f"{out.shape[1] - ids.shape[1]} new tokens instead of {new}")

    serve(run)


if __name__ == "__main__":
    main()
