"""Asks two clusters the same, and keeps what was different."""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Unpack, cast

from penstock.cli.parity.compare import Measure, differences
from penstock.cli.parity.proof import fault_apart, fault_together
from penstock.client import Client, InvalidRequest, Message, Model, Options, PenstockError, Result

__all__ = ["Kit", "Prompt", "Question", "Unanswered"]

Prompt = str | Sequence[int] | Sequence[Message]

_MOST_AT_ONCE = 8
# What an executor computes of a prompt in one step at most where it has not measured itself.
_COMMON_CHUNK = 512


class Unanswered(Exception):
    """A cluster failed to answer what the other may have answered; the text says which and how."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request, and whether it has to run apart on the cluster that does so, if its answer has more than one token."""

    prompt: Prompt
    options: Options
    must: bool = True


@dataclass(slots=True)
class Kit:
    """What a check works with. What a request leaves in the prefix caches is found by those alone that bring the same cache_salt.

    Attributes:
        together: the cluster that runs prefill and decoding together.
        apart: the one that does not.
        model: as `together` tells it.
        measure: how answers are compared.
        asked: requests so far, to each of the two.
        apart_count: those of them that ran apart.
        tokens: output tokens that were compared.
        kv_bytes: of KV that was handed over, by transport.
        native_count: requests of which it went over as the cache holds it, without conversion.
        faults: what was different, or ran where it should not.
        undecided: what was different where one cluster alone does not answer alike either.
    """

    together: Client
    apart: Client
    model: Model
    measure: Measure
    seed: str
    salt: str = field(default_factory=lambda: secrets.token_hex(8))
    asked: int = 0
    apart_count: int = 0
    tokens: int = 0
    kv_bytes: dict[str, int] = field(default_factory=dict)
    native_count: int = 0
    faults: list[str] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def chunk(self) -> int:
        """Prompt tokens that a step holds at most while others decode, as far as that is known."""
        chunks = [executor.calibration.prefill_chunk for executor in self.model.executors if executor.calibration]
        return max(chunks, default=_COMMON_CHUNK)

    def ids(self, length: int) -> list[int]:
        """A prompt of so many tokens, drawn at random and the same in every run."""
        draw = random.Random(f"{self.seed} {length}")  # noqa: S311 - the same prompts every time
        return [draw.randrange(self.model.vocabulary_size) for _ in range(min(length, self.model.context_length - 64))]

    def same(self, prompt: Prompt, *, must: bool = True, **options: Unpack[Options]) -> Result:
        """Ask both, compare, and return what the cluster that runs together said."""
        return self.same_at_once([Question(prompt, options, must)])[0]

    def same_at_once(self, questions: Sequence[Question]) -> list[Result]:
        """The same of several that run beside one another.

        Raises:
            InvalidRequest: both clusters refused one.
            Unanswered: one failed.
        """
        questions = [self._salted(self.asked + i, question) for i, question in enumerate(questions)]
        with ThreadPoolExecutor(2 * _MOST_AT_ONCE) as pool:
            asked = [(q, pool.submit(self._ask, self.together, q), pool.submit(self._ask, self.apart, q)) for q in questions]
            answers = [(q, one.result(), other.result()) for q, one, other in asked]
        judged = [self._judge(*answer) for answer in answers]
        different = [what for _, found in judged for what in found]
        if different:
            answered = list(zip(questions, (one for one, _ in judged), strict=True))
            (self.undecided if self._depends_on_company(answered) else self.faults).extend(different)
        return [one for one, _ in judged]

    def _depends_on_company(self, answered: Sequence[tuple[Question, Result]]) -> bool:
        """Whether the cluster that runs together answers one of these otherwise in other company, with fewer or more choices.

        Then no two runs beside others need be alike, on one cluster or on two.
        """
        if len(answered) == 1 and (answered[0][0].options.get("n") or 1) == 1:
            return False
        for question, result in answered:
            choices = question.options.get("n") or 1
            for count in range(1, choices + 2):
                options: Options = {**question.options, "n": count, "cache_salt": secrets.token_hex(8)}
                again = self._ask(self.together, replace(question, options=options))
                if isinstance(again, Result) and any(
                    one.token_ids != other.token_ids for one, other in zip(again.choices, result.choices, strict=False)
                ):
                    return True
        return False

    def _salted(self, number: int, question: Question) -> Question:
        options: Options = {"cache_salt": f"{number}", **question.options}
        options["cache_salt"] = f"{self.salt} {options['cache_salt']}"
        return replace(question, options=options)

    def _ask(self, cluster: Client, question: Question) -> Result | PenstockError:
        try:
            return self._answer(cluster, question)
        except PenstockError as error:
            return error

    def _answer(self, cluster: Client, question: Question) -> Result:
        options: Options = {"token_ids": True, "temperature": 0.0, **question.options}
        options["model"] = self.model.name
        prompt = question.prompt
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Message):
            return cluster.chat([one for one in prompt if isinstance(one, Message)], **options).result()
        ids = prompt if isinstance(prompt, str) else [one for one in prompt if isinstance(one, int)]
        return cluster.generate(ids, **options).result()

    def _judge(self, question: Question, one: Result | PenstockError, other: Result | PenstockError) -> tuple[Result, list[str]]:
        """What the cluster that runs together said, and what the other said otherwise. Where they ran is judged at once."""
        self.asked += 1
        if isinstance(one, InvalidRequest) and isinstance(other, InvalidRequest):
            raise one
        for where, outcome in (("together", one), ("apart", other)):
            if isinstance(outcome, PenstockError):
                raise Unanswered(f"request {self.asked}: {where}: {type(outcome).__name__}: {outcome}")
        return self._compare(question, cast("Result", one), cast("Result", other))

    def _compare(self, question: Question, one: Result, other: Result) -> tuple[Result, list[str]]:
        self.tokens += one.usage.completion_tokens
        if (handoff := other.closing.handoff) is not None:
            self.apart_count += 1
            self.kv_bytes[handoff.transport] = self.kv_bytes.get(handoff.transport, 0) + handoff.kv_bytes
            self.native_count += handoff.native
        found = []
        if why := fault_together(one.closing):
            found.append(f"together: {why}")
        # Prefill draws the first token: what ends with it has nothing to hand over.
        decodes = bool(other.choices) and len(other.choices[0].token_ids) > 1
        if why := fault_apart(other.closing, must=question.must and decodes):
            found.append(f"apart: {why}")
        self.faults += [f"request {self.asked}: {what}" for what in found]
        return one, [f"request {self.asked}: {what}" for what in differences(one, other, self.measure)]
