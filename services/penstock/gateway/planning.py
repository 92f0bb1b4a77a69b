"""From what a client asked for to what is run: defaults, the context's limit, seed, block hashes."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from penstock.common.errors import ContextOverflow, InvalidRequest
from penstock.common.prefix import block_hashes, tenant_salt, wire_form
from penstock.gateway.catalog import GenerationDefaults, Model
from penstock.gateway.request import Generation, Plan, PlannedSampling, Sampling
from penstock.gateway.validation import RequestLimits, fields_in_use

__all__ = ["plan"]

_LEAST_TEMPERATURE = 0.01
# A client is told its seed and may ask again with it; what reads JSON, JavaScript above all, often holds no longer number exactly.
_SEED_BITS = 53
# Enough for a decoder that reads tokens by their neighbours.
_PRECEDING_IDS = 16


def plan(
    generation: Generation,
    model: Model,
    ids: Sequence[int],
    fingerprint: str,
    tenant: str,
    limits: RequestLimits,
    *,
    echo: str | None = None,
) -> Plan:
    """What to run for a validated request whose prompt has these ids.

    Raises:
        ContextOverflow: prompt and answer do not fit into the context.
        InvalidRequest: the least that is asked for is more than there is room for.
    """
    # An executor draws at least one token.
    max_tokens = max(_max_tokens(generation, model, len(ids), limits), 1)
    salt = tenant_salt(tenant, generation.cache_salt)
    stopping = generation.stopping
    min_tokens = stopping.min_tokens or 0
    if min_tokens > max_tokens:
        raise InvalidRequest.field("stopping.min_tokens", f"at most {max_tokens}: there is room for no more new tokens")
    return Plan(
        model=model.name,
        tokenizer_fingerprint=fingerprint,
        prompt_ids=ids,
        sampling=_sampling(generation.sampling, model.first.defaults),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=tuple(stopping.stop),
        stop_ids=frozenset(stopping.stop_token_ids)
        | (frozenset() if stopping.ignore_eos else frozenset(model.first.eos_token_ids)),
        include_stop_text=stopping.include_stop_text,
        reporting=generation.reporting,
        n=generation.n,
        priority=generation.priority,
        fields=fields_in_use(generation),
        block_hashes=wire_form(block_hashes(ids, model.first.kv_block_size, salt)),
        salt=salt,
        echo=echo,
        preceding_ids=ids[-_PRECEDING_IDS:] if generation.messages is None or generation.continue_final_message else (),
        prompt_only=stopping.max_tokens == 0,
    )


def _max_tokens(generation: Generation, model: Model, prompt_tokens: int, limits: RequestLimits) -> int:
    context = model.context_length
    if prompt_tokens == 0:
        raise InvalidRequest.field("prompt", "is empty; give at least one token")
    left = context - prompt_tokens
    if left < 1:
        raise ContextOverflow.field(
            # As the tokenizer says it of a text.
            "prompt",
            f"{prompt_tokens} tokens; at most {context - 1} fit",
        )
    asked = generation.stopping.max_tokens
    if asked is None:
        return min(left, limits.max_tokens // generation.n)
    if asked > left:
        raise ContextOverflow.field("stopping.max_tokens", f"at most {left} behind a prompt of {prompt_tokens} tokens")
    return asked


def _sampling(asked: Sampling, defaults: GenerationDefaults) -> PlannedSampling:
    return PlannedSampling(
        temperature=_temperature(_first(asked.temperature, defaults.temperature, 1.0)),
        top_p=_first(asked.top_p, defaults.top_p, 1.0),
        top_k=int(_first(asked.top_k, defaults.top_k, 0)),
        min_p=_first(asked.min_p, defaults.min_p, 0.0),
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        repetition_penalty=_first(asked.repetition_penalty, defaults.repetition_penalty, 1.0),
        logit_bias=asked.logit_bias,
        seed=asked.seed if asked.seed is not None else secrets.randbits(_SEED_BITS),
    )


def _temperature(asked: float) -> float:
    """As in vLLM: logits that are divided by less overflow, and what is drawn is the same."""
    return max(asked, _LEAST_TEMPERATURE) if asked else 0.0


def _first(asked: float | None, default: float | None, neutral: float) -> float:
    if asked is not None:
        return asked
    return default if default is not None else neutral
