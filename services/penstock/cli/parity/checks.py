"""What is asked of both clusters, check by check. A check's text is what it asks for in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from penstock.cli.parity.kit import Kit, Question
from penstock.client import Message

__all__ = ["CHECKS"]


class _Drawn(TypedDict):
    temperature: float
    top_p: float
    top_k: int
    max_tokens: int


_COUNT = "Count from 7: 7 8 9"
# Around the block sizes of the backends, which are 16 and 32 tokens, and one token alone.
_LENGTHS = (1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129)
_DRAWN: _Drawn = {"temperature": 0.8, "top_p": 0.95, "top_k": 40, "max_tokens": 12}


def greedy(kit: Kit) -> None:
    """Greedy tokens, of text and of ids."""
    for prompt in (_COUNT, "What is 58 + 67?", kit.ids(40), kit.ids(200)):
        kit.same(prompt, max_tokens=24)


def chat(kit: Kit) -> None:
    """A conversation in the model's own template."""
    kit.same([Message("user", "What is 58 + 67?")], max_tokens=16)


def prompt_lengths(kit: Kit) -> None:
    """Prompts shorter than a block, and around its size."""
    for length in _LENGTHS:
        kit.same(kit.ids(length), max_tokens=6)


def long_prompt(kit: Kit) -> None:
    """A prompt longer than a chunk, alone and beside others that decode."""
    kit.same(kit.ids(2 * kit.chunk + 17), max_tokens=8)
    beside = [Question(kit.ids(20 + i), {"max_tokens": 48, "ignore_eos": True}) for i in range(3)]
    kit.same_at_once([*beside, Question(kit.ids(2 * kit.chunk + 18), {"max_tokens": 8})])


def logprobs(kit: Kit) -> None:
    """Log-probabilities of output tokens, with and without alternatives."""
    kit.same(kit.ids(40), max_tokens=12, logprobs=5)
    kit.same(kit.ids(33), max_tokens=4, logprobs=0)
    kit.same(kit.ids(48), **_DRAWN, seed=5, logprobs=3)


def prompt_logprobs(kit: Kit) -> None:
    """Log-probabilities of prompt tokens, with an answer and alone."""
    kit.same(kit.ids(40), max_tokens=4, prompt_logprobs=3, logprobs=2)
    kit.same(kit.ids(70), max_tokens=0, prompt_logprobs=1)


def max_tokens(kit: Kit) -> None:
    """Answers of one token, of two, and of few."""
    for most in (1, 2, 3, 7):
        result = kit.same(kit.ids(37), max_tokens=most, ignore_eos=True)
        if result.usage.completion_tokens != most:
            kit.faults.append(f"max_tokens {most} gave {result.usage.completion_tokens} tokens")


def stop_token(kit: Kit) -> None:
    """An answer that a stop token ends: in its midst, and at its first token."""
    ids = kit.same(kit.ids(37), max_tokens=24, ignore_eos=True).choices[0].token_ids
    latest = max(ids.index(token) for token in ids)
    kit.same(kit.ids(37), max_tokens=24, stop_token_ids=[ids[latest]], ignore_eos=True)
    kit.same(kit.ids(37), max_tokens=24, stop_token_ids=[ids[0]], ignore_eos=True)
    kit.same(kit.ids(37), max_tokens=24, stop_token_ids=[ids[0]], ignore_eos=True, min_tokens=3)


def stop_text(kit: Kit) -> None:
    """An answer that a stop text ends, with the text in it and without."""
    text = kit.same(_COUNT, max_tokens=24, ignore_eos=True).text
    stop = text[len(text) // 2 :][:3] or text
    for include in (False, True):
        kit.same(_COUNT, max_tokens=24, stop=[stop, "never to be seen"], include_stop_text=include)


def seeds(kit: Kit) -> None:
    """Drawn tokens, by seed, with every way to truncate."""
    for seed in (1, 2, 3):
        kit.same(kit.ids(29), **_DRAWN, seed=seed)
    kit.same(kit.ids(30), temperature=1.3, min_p=0.02, seed=9, max_tokens=12)


def choices(kit: Kit) -> None:
    """Several choices of one prompt, drawn and greedy."""
    kit.same(kit.ids(37), **_DRAWN, n=4, seed=11)
    kit.same(kit.ids(65), max_tokens=6, n=2)
    kit.same(kit.ids(5), **_DRAWN, n=3, seed=12)


def penalties(kit: Kit) -> None:
    """Penalties for what stands in prompt or output."""
    kit.same(kit.ids(29), max_tokens=16, presence_penalty=1.5)
    kit.same(kit.ids(30), max_tokens=16, frequency_penalty=1.0, presence_penalty=-0.5)
    kit.same(kit.ids(31), max_tokens=16, repetition_penalty=1.3)
    kit.same(kit.ids(32), **_DRAWN, seed=4, repetition_penalty=1.2, frequency_penalty=0.7)


def logit_bias(kit: Kit) -> None:
    """Tokens that are made likely and unlikely."""
    first = kit.same(kit.ids(29), max_tokens=2, ignore_eos=True).choices[0].token_ids[0]
    other = (first + 1) % kit.model.vocabulary_size
    kit.same(kit.ids(29), max_tokens=8, logit_bias={first: -100.0})
    kit.same(kit.ids(30), max_tokens=8, logit_bias={other: 100.0}, ignore_eos=True)


def usage(kit: Kit) -> None:
    """Usage and cached tokens of a prompt that is asked twice, and of one that goes on behind it."""
    prompt = kit.ids(150)
    kit.same(prompt, max_tokens=4, cache_salt="twice")
    kit.same(prompt, max_tokens=4, cache_salt="twice", must=False)
    kit.same([*prompt, *kit.ids(45)], max_tokens=4, cache_salt="twice", must=False)


def at_once(kit: Kit) -> None:
    """Requests beside one another, of all lengths."""
    kit.same_at_once([Question(kit.ids(11 + 37 * i), {"max_tokens": 12 + i, "seed": i, "temperature": i % 2}) for i in range(8)])


CHECKS: dict[str, Callable[[Kit], None]] = {
    check.__name__: check
    for check in (
        *(greedy, chat, prompt_lengths, long_prompt, logprobs, prompt_logprobs, max_tokens, stop_token, stop_text),
        *(seeds, choices, penalties, logit_bias, usage, at_once),
    )
}
