"""What both benchmarks are told: which work, and how its results are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from penstock.cli.bench.scenarios import Poisson, Scenario, named
from penstock.cli.bench.timeline import Slo
from penstock.common.config import ConfigError

__all__ = ["WHOLE", "DTypeName", "Work"]

DTypeName = Literal["auto", "f32", "bf16", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work, and the form of its results.

    Attributes:
        scenario: One of prefill-512, decode-b1, decode-b8, decode-b32, mixed-b16; may stand several times. All where absent.
        repeats: Runs of each scenario, each over other prompts; the quickest is told.
        rate: Poisson arrivals instead of scenarios: requests a second on average.
        duration: Seconds of arrivals.
        prompt_tokens: Mean length of a prompt under --rate.
        output_tokens: Mean length of an answer under --rate.
        spread: Lengths under --rate are drawn evenly from the mean less and plus this share of it.
        ttft_slo_ms: Under --rate, an answer is good whose first token comes within this time.
        itl_slo_ms: Under --rate, an answer is good whose later tokens come this far apart on average, or nearer.
        seed: Of arrivals, lengths and prompts under --rate.
        as_json: One JSON object a line instead of a table.
        ids: File for the token ids of every answer, as JSON, by scenario.
    """

    scenario: tuple[str, ...] = ()
    repeats: int = 3
    rate: float | None = None
    duration: float = 30.0
    prompt_tokens: int = 256
    output_tokens: int = 64
    spread: float = 0.5
    ttft_slo_ms: float = 1000.0
    itl_slo_ms: float = 100.0
    seed: int = 0
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    ids: Path | None = None

    def scenarios(self) -> list[Scenario]:
        """The scenarios to run, none under ``--rate``.

        Raises:
            ConfigError: an option is wrong; names it and what would be right.
        """
        self._check()
        if self.rate is not None:
            return []
        try:
            return named(self.scenario)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def poisson(self) -> Poisson | None:
        """The open loop to run, if any."""
        if self.rate is None:
            return None
        return Poisson(self.rate, self.duration, self.prompt_tokens, self.output_tokens, self.spread)

    def slo(self) -> Slo:
        """What a good answer keeps."""
        return Slo(self.ttft_slo_ms / 1000, self.itl_slo_ms / 1000)

    def _check(self) -> None:
        positive = ("repeats", "duration", "prompt_tokens", "output_tokens", "ttft_slo_ms", "itl_slo_ms")
        for name in positive if self.rate is None else ("rate", *positive):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')}: must be above 0, and is {getattr(self, name)}")
        if not 0 <= self.spread < 1:
            raise ConfigError(f"--spread: must be at least 0 and below 1, and is {self.spread}")
        if self.rate is not None and self.scenario:
            raise ConfigError("--rate and --scenario exclude each other: Poisson arrivals are a scenario of their own")


WHOLE = Work()
