"""vLLM on the processor, without its HTTP server. bf16."""

from __future__ import annotations

import os
from collections.abc import Sequence

from serving import Arguments, Loaded, serve


def load(arguments: Arguments) -> Loaded:
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="4", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    import vllm  # reads the environment when it is imported

    if arguments.precision != "bf16":
        raise ValueError(f"precision {arguments.precision}: this runner knows bf16")
    engine = vllm.LLM(
        str(arguments.model),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
    )

    def run(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[int]:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [len(answer.outputs[0].token_ids) for answer in answers]

    return Loaded(vllm.__version__, run, "batches of 2048 tokens")


if __name__ == "__main__":
    serve(load)
