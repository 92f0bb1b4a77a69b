"""Answers in OpenAI's shape, chunk by chunk or whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from penstock.gateway.admission import Call
from penstock.gateway.answer import Closing, Delta, Finish, FinishReason
from penstock.gateway.http_door.closings import closings as told_closings
from penstock.gateway.http_door.logprobs import CompletionLogprobs, chat_logprobs, prompt_logprobs
from penstock.gateway.http_door.schemas import StreamOptions

__all__ = ["ChatRendering", "CompletionRendering", "Rendering", "usage"]

# The last three are extensions: an answer that was cut off is not one that reached its length.
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.DEADLINE: "deadline",
    FinishReason.CANCELLED: "cancelled",
    FinishReason.ERROR: "error",
}


class Rendering(Protocol):
    """One call's way from deltas to OpenAI's objects."""

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""

    def chunk(self, delta: Delta) -> dict[str, Any]:
        """A delta as a chunk."""

    def whole(self, deltas: Sequence[Delta], closings: Sequence[Closing]) -> dict[str, Any]:
        """The complete answer, of one delta a choice."""

    def last(self, closings: Sequence[Closing]) -> dict[str, Any]:
        """The chunk that bears the usage."""


def usage(closings: Sequence[Closing]) -> dict[str, Any]:
    """``usage`` over all prompts of a call."""
    return {
        **_counts(sum(c.prompt_tokens for c in closings), sum(c.completion_tokens for c in closings)),
        "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in closings)},
    }


def _counts(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Base:
    kind: str
    chunk_kind: str

    def __init__(self, call: Call, request_id: str, options: StreamOptions) -> None:
        self._call = call
        self._options = options
        self._head = {
            "id": request_id,
            "created": int(time.time()),
            "model": call.model.name,
            "system_fingerprint": f"fp_{call.model.first.model_fingerprint[:16]}" if call.model.first.model_fingerprint else None,
        }
        self._choices_per_prompt = call.plans[0].n

    def last(self, closings: Sequence[Closing]) -> dict[str, Any]:
        return {
            **self._head,
            "object": self.chunk_kind,
            "choices": [],
            "usage": usage(closings),
            "closings": told_closings(closings),
        }

    def _chunk(self, choice: dict[str, Any], *, opens: bool = False) -> dict[str, Any]:
        """One with a choice, of which all that was told is told with it, or nothing yet where it `opens` it."""
        chunk = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        if self._options.continuous_usage_stats:
            chunk["usage"] = self._usage_so_far(choice["index"], told=not opens)
        elif self._options.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage_so_far(self, index: int, *, told: bool) -> dict[str, Any]:
        """As in vLLM of this choice alone."""
        number, choice = divmod(index, self._choices_per_prompt)
        tokens = self._call.requests[number].choices[choice].told_tokens if told else 0
        return _counts(len(self._call.plans[number].prompt_ids), tokens)

    def _whole(self, choices: list[dict[str, Any]], closings: Sequence[Closing]) -> dict[str, Any]:
        choices.sort(key=lambda c: int(c["index"]))
        return {
            **self._head,
            "object": self.kind,
            "choices": choices,
            "usage": usage(closings),
            "closings": told_closings(closings),
        }

    def _ending(self, delta: Delta) -> dict[str, Any]:
        """What every choice has: its end, and its tokens where they were asked for."""
        plan = self._call.plans[delta.index // self._choices_per_prompt]
        ending: dict[str, Any] = {"finish_reason": None, "stop_reason": None}
        if delta.finish is not None:
            ending["finish_reason"] = _REASONS[delta.finish.reason]
            ending["stop_reason"] = self._stop_reason(delta.finish)
        if plan.reporting.token_ids:
            ending["token_ids"] = delta.token_ids
        return ending

    def _stop_reason(self, finish: Finish) -> str | int | None:
        """vLLM's: the text or the token that the client named; None for an end-of-sequence token."""
        if finish.reason is FinishReason.STOP_SEQUENCE:
            return finish.stop_text
        return finish.stop_token_id if finish.stop_token_id not in self._call.model.first.eos_token_ids else None


class CompletionRendering(_Base):
    """``text_completion`` objects."""

    kind = chunk_kind = "text_completion"

    def __init__(self, call: Call, request_id: str, options: StreamOptions) -> None:
        super().__init__(call, request_id, options)
        self._begun: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunk(self, delta: Delta) -> dict[str, Any]:
        return self._chunk(self._choice(delta))

    def whole(self, deltas: Sequence[Delta], closings: Sequence[Closing]) -> dict[str, Any]:
        return self._whole([self._choice(delta) for delta in deltas], closings)

    def _choice(self, delta: Delta) -> dict[str, Any]:
        logprobs = self._told_logprobs(delta)
        return {"index": delta.index, "text": delta.text, "logprobs": logprobs, **self._ending(delta), **self._of_prompt(delta)}

    def _of_prompt(self, delta: Delta) -> dict[str, Any]:
        """What was asked for of a choice's prompt, once; as in vLLM it stands in the choice, for prompts may be many."""
        told: dict[str, Any] = {}
        plan = self._call.plans[delta.index // self._choices_per_prompt]
        begins = delta.index not in self._begun
        self._begun.add(delta.index)
        if plan.reporting.token_ids and begins:
            told["prompt_token_ids"] = list(plan.prompt_ids)
        # Of a prompt of one token nothing is known but that it has one.
        alone = begins and plan.reporting.prompt_logprobs is not None and len(plan.prompt_ids) == 1
        if delta.prompt_logprobs or alone:
            told["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs)
        return told

    def _told_logprobs(self, delta: Delta) -> dict[str, Any] | None:
        plan = self._call.plans[delta.index // self._choices_per_prompt]
        if plan.reporting.logprobs is None:
            return None
        columns = self._logprobs.setdefault(delta.index, CompletionLogprobs())
        begun = None
        if plan.echo is not None and delta.index not in self._begun:
            request = self._call.requests[delta.index // self._choices_per_prompt]
            begun = columns.prompt(plan.echo, request.token_bytes(plan.prompt_ids[0]), delta.prompt_logprobs)
        return columns.output(delta.logprobs, begun)


class ChatRendering(_Base):
    """``chat.completion`` objects and their chunks. As in vLLM, what was asked for of the prompt stands beside the choices."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, call: Call, request_id: str, options: StreamOptions) -> None:
        super().__init__(call, request_id, options)
        self._prompt_scored = False

    def opening(self) -> list[dict[str, Any]]:
        count = len(self._call.plans) * self._choices_per_prompt
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None} for i in range(count)]
        chunks = [self._chunk(choice, opens=True) for choice in choices]
        chunks[0].update(self._prompt_ids())
        return chunks

    def chunk(self, delta: Delta) -> dict[str, Any]:
        text = delta.text
        content = {"content": text} if text or delta.token_ids or delta.logprobs else {}
        return {**self._chunk({"index": delta.index, "delta": content, **self._rest(delta)}), **self._prompt_scores(delta)}

    def whole(self, deltas: Sequence[Delta], closings: Sequence[Closing]) -> dict[str, Any]:
        choices = [
            {
                "index": delta.index,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                **self._rest(delta),
            }
            for delta in deltas
        ]
        scores = next(filter(None, map(self._prompt_scores, deltas)), {})
        return {**self._whole(choices, closings), **self._prompt_ids(), **scores}

    def _prompt_ids(self) -> dict[str, Any]:
        plan = self._call.plans[0]
        return {"prompt_token_ids": list(plan.prompt_ids)} if plan.reporting.token_ids else {}

    def _prompt_scores(self, delta: Delta) -> dict[str, Any]:
        """Every choice has them; they are told once."""
        if not delta.prompt_logprobs or self._prompt_scored:
            return {}
        self._prompt_scored = True
        return {"prompt_logprobs": prompt_logprobs(delta.prompt_logprobs)}

    def _rest(self, delta: Delta) -> dict[str, Any]:
        wanted = self._call.plans[0].reporting.logprobs is not None
        return {"logprobs": chat_logprobs(delta.logprobs) if wanted else None, **self._ending(delta)}
