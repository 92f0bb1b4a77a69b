"""How an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["EngineConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How an engine runs.

    Attributes:
        context_length: tokens that one sequence holds at most; never more than the cache has room for.
        max_batch_tokens: tokens of one step; more than `max_batch_size`.
        max_batch_size: sequences that run at a time.
        prefill_chunk: prompt tokens of one step while others decode.
        chunked_prefill: whether the backend takes a prompt in several steps.
        prompt_logits: whether it gives logits of prompt tokens.
        export_kv: whether KV can be copied out of its cache.
        import_kv: whether it can be copied in.
        stall_seconds: what a step may take, beyond what was measured or is given to prompt tokens, before the engine is stalled.
        stall_seconds_per_prompt_token: what a prompt token adds to that where nothing was measured.
    """

    vocabulary_size: int
    context_length: int
    max_batch_tokens: int = 2048
    max_batch_size: int = 64
    prefill_chunk: int = 512
    prefix_cache: bool = True
    chunked_prefill: bool = True
    prompt_logits: bool = True
    export_kv: bool = True
    import_kv: bool = True
    stall_seconds: float = 2.5
    stall_seconds_per_prompt_token: float = 0.05

    def __post_init__(self) -> None:
        if self.max_batch_tokens <= self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be more than max_batch_size ({self.max_batch_size}): every "
                "running sequence takes a token of each step, and prompts need room beside them"
            )
