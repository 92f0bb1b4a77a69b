"""What a request asks of the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["SamplingParameters"]

# As in vLLM: logits divided by less tell nothing but which is the largest, and overflow.
_COLDEST = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParameters:
    """How an output token is drawn; the gateway's validator has bounded each value.

    Attributes:
        temperature: 0 is greedy, and so is less than 1e-5.
        top_p: of the likeliest tokens, the smallest set whose probability reaches this is kept; 1 keeps all.
        top_k: so many of the likeliest tokens are kept, and those as likely as the last of them; 0 keeps all.
        min_p: tokens at least this times as likely as the likeliest are kept.
        presence_penalty: taken from the logit of each token that stands in the output.
        frequency_penalty: the same, once for each time that it stands there.
        repetition_penalty: logits of tokens of prompt and output are divided by it if positive, else multiplied by it.
        logit_bias: added to logits, by token id.
        seed: the random number of an output token depends on this and the token's position alone.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever the random number."""
        return self.temperature < _COLDEST

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were seen before count."""
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0
