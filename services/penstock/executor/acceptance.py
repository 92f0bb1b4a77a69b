"""What an engine does not take: told before anything is done for it."""

from __future__ import annotations

from penstock.executor.engine_config import EngineConfig
from penstock.executor.handoff.ticket import Receive, Send
from penstock.executor.sequence import SequenceRequest

__all__ = ["fault_of", "refusal_of"]


def fault_of(request: SequenceRequest, size: int) -> str:
    """What is wrong with a request wherever a model of this vocabulary runs. The gateway lets none of this through."""
    sampling, handoff = request.sampling, request.handoff
    if not request.prompt or len(request.replayed) >= request.max_tokens:
        return "there is nothing to compute: the prompt is empty, or all of the output was replayed"
    if max(request.prompt) >= size or max(request.replayed, default=0) >= size or max(sampling.logit_bias, default=0) >= size:
        return f"token ids must be less than {size}"
    if not (0 <= sampling.temperature <= 100 and 0 < sampling.repetition_penalty <= 10):
        return "temperature must be from 0 to 100, and repetition_penalty more than 0 and at most 10"
    if not (0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1):
        return "top_p must be more than 0 and at most 1, and min_p from 0 to 1"
    if isinstance(handoff, Send) and not handoff.ticket.cached_tokens < handoff.ticket.tokens == _known(request):
        return f"the ticket is for {handoff.ticket.tokens} tokens, and {_known(request)} are here"
    return ""


def refusal_of(request: SequenceRequest, config: EngineConfig, most: int, *, hands_over: bool) -> str:
    """Why a request can not run in this engine, though it may in another.

    Args:
        request: what is asked.
        config: the engine's.
        most: tokens that one sequence has room for.
        hands_over: whether KV can go elsewhere and come from there.
    """
    handoff = request.handoff
    if handoff is not None and (refusal := _refusal_of_handoff(handoff, config, hands_over=hands_over)):
        return refusal
    if request.prompt_logprobs is not None and not config.prompt_logits and not isinstance(handoff, Receive):
        return "the backend gives no log-probabilities of the prompt"
    # What is sent ends here with its first token, which is not computed on.
    asked = _known(request) if isinstance(handoff, Send) else len(request.prompt) + request.max_tokens
    if asked > most:
        return f"{len(request.prompt)} prompt tokens and {request.max_tokens} new ones are more than the {most} that fit"
    if not config.chunked_prefill and asked > config.max_batch_tokens:
        return f"{asked} tokens are more than the {config.max_batch_tokens} of one step, and the backend takes prompts whole"
    return ""


def _refusal_of_handoff(handoff: Receive | Send, config: EngineConfig, *, hands_over: bool) -> str:
    if not hands_over:
        return "the executor takes part in no handoff of KV"
    if isinstance(handoff, Receive) and not config.import_kv:
        return "the backend takes no KV from another executor"
    if isinstance(handoff, Send) and not config.export_kv:
        return "the backend gives no KV to another executor"
    return ""


def _known(request: SequenceRequest) -> int:
    """Tokens whose KV stands in blocks once the first new one can be drawn."""
    return len(request.prompt) + len(request.replayed)
