"""The one validator behind both doors. Fields are named by their path in `penstock.v1`; the doors know their own names for them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from penstock.common.errors import FieldViolation, InvalidRequest, UnsupportedField
from penstock.gateway.bounds import MAX_BIASES, MAX_MESSAGES, MAX_STOP_IDS, MAX_STOPS
from penstock.gateway.catalog import Model
from penstock.gateway.request import Generation, Reporting, Sampling, Stopping

__all__ = ["RequestLimits", "fields_in_use", "validate", "validate_input"]

MAX_STOP_BYTES = 1024
MAX_LOGPROBS = 20
MAX_SALT_BYTES = 256
_MOST_TOKENS = 2**31 - 1
_TEMPLATE_KWARGS = "conversation.chat_template_kwargs"
# Whole numbers are the same in double precision up to here, which is how they go to the tokenizer.
_LARGEST_TEMPLATE_NUMBER = 2**53
# 0.01 in single precision. Less makes numbers of logits that are none.
LEAST_REPETITION_PENALTY = ctypes.c_float(0.01).value

Violations = Iterator[FieldViolation]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """What one request may ask for."""

    max_tokens: int
    max_choices: int
    max_prompts: int


def validate(generation: Generation, model: Model, limits: RequestLimits) -> None:
    """Check all that can be checked before the prompt is encoded.

    Raises:
        InvalidRequest: with every violation found.
        UnsupportedField: no live executor of the model supports a field that is in use.
    """
    violations = [
        *_input(generation, model),
        *_sampling(generation.sampling, model),
        *_stopping(generation.stopping, generation.reporting, model),
        *_reporting(generation.reporting),
        *_rest(generation, limits),
    ]
    if violations:
        raise InvalidRequest(*violations)
    unsupported = [f for f in fields_in_use(generation) if f not in model.fields]
    if unsupported:
        raise UnsupportedField(
            *(FieldViolation(f, f"no executor of {model.name!r} supports this; leave it out") for f in unsupported)
        )


def validate_input(generation: Generation, model: Model) -> None:
    """Check a prompt or a conversation that is only to be encoded.

    Raises:
        InvalidRequest: with every violation found.
    """
    violations = list(_input(generation, model))
    if violations:
        raise InvalidRequest(*violations)


def fields_in_use(generation: Generation) -> list[str]:
    """The public fields that an executor has to support for this request."""
    sampling, stopping, reporting = generation.sampling, generation.stopping, generation.reporting
    used = [
        ("sampling.temperature", sampling.temperature is not None),
        ("sampling.top_p", sampling.top_p is not None),
        ("sampling.top_k", sampling.top_k is not None),
        ("sampling.min_p", sampling.min_p is not None),
        ("sampling.presence_penalty", bool(sampling.presence_penalty)),
        ("sampling.frequency_penalty", bool(sampling.frequency_penalty)),
        ("sampling.repetition_penalty", sampling.repetition_penalty is not None),
        ("sampling.logit_bias", bool(sampling.logit_bias)),
        ("sampling.seed", sampling.seed is not None),
        ("stopping.max_tokens", stopping.max_tokens is not None),
        ("stopping.min_tokens", bool(stopping.min_tokens)),
        ("stopping.stop", bool(stopping.stop)),
        ("stopping.stop_token_ids", bool(stopping.stop_token_ids)),
        ("stopping.ignore_eos", stopping.ignore_eos),
        ("reporting.logprobs", reporting.logprobs is not None),
        ("reporting.prompt_logprobs", reporting.prompt_logprobs is not None),
    ]
    return [field for field, is_used in used if is_used]


def _input(generation: Generation, model: Model) -> Violations:
    given = [k for k in (generation.text, generation.token_ids, generation.messages) if k is not None]
    if len(given) != 1:
        yield FieldViolation("prompt", "give a text, token ids or a conversation")
    if generation.text is not None:
        if not generation.text:
            yield FieldViolation("prompt", "is empty; give at least one token")
        yield from _unicode("prompt", generation.text)
    if generation.token_ids is not None:
        if not generation.token_ids:
            yield FieldViolation("prompt", "is empty; give at least one token")
        yield from _ids("prompt", generation.token_ids, model)
    if generation.messages is not None:
        yield from _conversation(generation)


def _conversation(generation: Generation) -> Violations:
    messages = generation.messages or ()
    if generation.continue_final_message and generation.add_generation_prompt:
        yield FieldViolation(
            "conversation.continue_final_message", "can not stand with add_generation_prompt, which ends the last message"
        )
    yield from _template_kwargs(generation.chat_template_kwargs)
    if not messages:
        yield FieldViolation("conversation.messages", "is empty; give at least one message")
    if len(messages) > MAX_MESSAGES:
        yield FieldViolation("conversation.messages", f"at most {MAX_MESSAGES} messages; these are {len(messages)}")
        return
    for i, message in enumerate(messages):
        if not message.role:
            yield FieldViolation(f"conversation.messages[{i}].role", "is empty; give system, user, assistant or another role")
        for name in ("role", "content", "name"):
            yield from _unicode(f"conversation.messages[{i}].{name}", getattr(message, name))


def _template_kwargs(given: Mapping[str, str | float | bool | None]) -> Violations:
    for name, value in given.items():
        yield from _unicode(_TEMPLATE_KWARGS, name)
        if isinstance(value, str):
            yield from _unicode(_TEMPLATE_KWARGS, value)
        elif value is not None and not -_LARGEST_TEMPLATE_NUMBER <= value <= _LARGEST_TEMPLATE_NUMBER:
            yield FieldViolation(_TEMPLATE_KWARGS, f"numbers within ±2^53; {name[:64]!a} is {str(value)[:24]}")


def _sampling(sampling: Sampling, model: Model) -> Violations:
    yield from _range("sampling.temperature", sampling.temperature, 0, 100)
    yield from _range("sampling.top_p", _single(sampling.top_p), 0, 1, above=True)
    yield from _range("sampling.top_k", sampling.top_k, 0, 2**32 - 1)
    yield from _range("sampling.min_p", sampling.min_p, 0, 1)
    yield from _range("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    yield from _range("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    yield from _range("sampling.repetition_penalty", _single(sampling.repetition_penalty), LEAST_REPETITION_PENALTY, 10)
    yield from _range("sampling.seed", sampling.seed, 0, 2**64 - 1)
    if len(sampling.logit_bias) > MAX_BIASES:
        yield FieldViolation("sampling.logit_bias", f"at most {MAX_BIASES} token ids; these are {len(sampling.logit_bias)}")
        return
    yield from _ids("sampling.logit_bias", list(sampling.logit_bias), model)
    for token_id, bias in sampling.logit_bias.items():
        yield from _range(f"sampling.logit_bias[{token_id}]", bias, -100, 100)


def _stopping(stopping: Stopping, reporting: Reporting, model: Model) -> Violations:
    tells_prompt = reporting.echo or reporting.prompt_logprobs is not None
    if stopping.max_tokens == 0 and not tells_prompt:
        yield FieldViolation("stopping.max_tokens", "at least 1, or 0 together with echo or prompt_logprobs")
    else:
        yield from _range("stopping.max_tokens", stopping.max_tokens, 0 if tells_prompt else 1, _MOST_TOKENS)
    yield from _range("stopping.min_tokens", stopping.min_tokens, 0, _MOST_TOKENS)
    if stopping.min_tokens and stopping.max_tokens is not None and stopping.min_tokens > stopping.max_tokens:
        yield FieldViolation("stopping.min_tokens", f"at most max_tokens, which is {str(stopping.max_tokens)[:24]}")
    if len(stopping.stop) > MAX_STOPS:
        yield FieldViolation("stopping.stop", f"at most {MAX_STOPS} texts; these are {len(stopping.stop)}")
        return
    for i, stop in enumerate(stopping.stop):
        yield from _unicode(f"stopping.stop[{i}]", stop)
        if not 1 <= len(stop.encode(errors="replace")) <= MAX_STOP_BYTES:
            yield FieldViolation(f"stopping.stop[{i}]", f"between 1 and {MAX_STOP_BYTES} bytes")
    if len(stopping.stop_token_ids) > MAX_STOP_IDS:
        yield FieldViolation("stopping.stop_token_ids", f"at most {MAX_STOP_IDS} ids; these are {len(stopping.stop_token_ids)}")
    else:
        yield from _ids("stopping.stop_token_ids", stopping.stop_token_ids, model)


def _reporting(reporting: Reporting) -> Violations:
    yield from _range("reporting.logprobs", reporting.logprobs, 0, MAX_LOGPROBS)
    yield from _range("reporting.prompt_logprobs", reporting.prompt_logprobs, 0, MAX_LOGPROBS)


def _rest(generation: Generation, limits: RequestLimits) -> Violations:
    yield from _range("n", generation.n, 1, limits.max_choices)
    yield from _range("priority", generation.priority, -100, 100)
    yield from _unicode("cache_salt", generation.cache_salt)
    if len(generation.cache_salt.encode(errors="replace")) > MAX_SALT_BYTES:
        yield FieldViolation("cache_salt", f"at most {MAX_SALT_BYTES} bytes")
    n, each = generation.n, generation.stopping.max_tokens or 0
    if 1 <= n <= limits.max_choices and each <= _MOST_TOKENS and (asked := n * each) > limits.max_tokens:
        yield FieldViolation("stopping.max_tokens", f"n * max_tokens is {asked}; at most {limits.max_tokens} here")


def _single(value: float | None) -> float | None:
    """As executors get it, in single precision: what is just above a bound may be on it there, and the other way round."""
    return None if value is None else ctypes.c_float(value).value


def _range(field: str, value: float | None, low: float, high: float, *, above: bool = False) -> Violations:
    """`above`: the low end itself is out."""
    if value is None:
        return
    if not low <= value <= high or (above and value == low):  # no number that is none is within
        yield FieldViolation(field, f"in {'(' if above else '['}{low:.6g}, {high}]; this is {str(value)[:24]}")


def _ids(field: str, ids: Sequence[int], model: Model) -> Violations:
    if ids and not (min(ids) >= 0 and max(ids) < model.vocabulary_size):
        wrong = next(i for i in ids if not 0 <= i < model.vocabulary_size)
        shown = str(wrong)[:24]
        yield FieldViolation(field, f"token ids from 0 to {model.vocabulary_size - 1}; {shown} is outside the vocabulary")


def _unicode(field: str, text: str) -> Violations:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        yield FieldViolation(field, f"valid Unicode; a lone surrogate stands at character {error.start}")
