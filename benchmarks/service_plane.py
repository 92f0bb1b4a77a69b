"""What the services cost: a suite over gRPC against its engine in process, in turn, on the same work.

    python benchmarks/service_plane.py MODEL [--dtype int8] [--rounds 5]

MODEL is a folder or a hub id; the figures in docs/benchmarks.md are of Qwen3-0.6B's shape. Both are loaded at the same time and run
one after the other, the first of each round in turn, so that both meet the same machine. A ratio above 1 says the suite is quicker.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import dataclass, field

from measuring import report, spread, suite
from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.bench.measure import warm
from penstock.cli.bench.scenarios import Request, Scenario, named, prompts
from penstock.cli.bench.target import Target
from penstock.cli.bench.timeline import Timeline
from penstock.cli.huge_pages import start_again_with_huge_pages

SCENARIOS = ("decode-b1", "decode-b8", "decode-b32")
FIRST_TOKENS = 120


@dataclass
class Pair:
    """Results of the same work on both, by round."""

    engine: list[list[Timeline]] = field(default_factory=list)
    through: list[list[Timeline]] = field(default_factory=list)

    def run(self, engine: Target, through: Target, work: list[Request]) -> None:
        order = [(engine, self.engine), (through, self.through)]
        for target, results in order if len(self.engine) % 2 else reversed(order):
            timelines = target.run(work, lambda: None)
            failed = [t.error for t in timelines if t.error]
            if failed:
                raise SystemExit(f"{target.description.engine}: {failed[0]}")
            results.append(timelines)

    def identical(self) -> bool:
        """Whether both gave the same ids in every round."""
        return [[t.ids for t in run] for run in self.engine] == [[t.ids for t in run] for run in self.through]


def seconds(run: list[Timeline]) -> float:
    return max(t.ended for t in run) - min(t.sent for t in run)


def compare(engine: Target, through: Target, scenario: Scenario, rounds: int) -> dict[str, object]:
    pair = Pair()
    for seed in range(rounds):
        pair.run(engine, through, scenario.work(seed, engine.description.vocabulary))
    tokens = scenario.requests * scenario.new_tokens
    alone, served = [seconds(r) for r in pair.engine], [seconds(r) for r in pair.through]
    return {
        "engine_out_tok_s": spread([tokens / s for s in alone]),
        "suite_out_tok_s": spread([tokens / s for s in served]),
        "ratio_of_best": round(min(alone) / min(served), 4),
        "ratio_by_round": spread([a / s for a, s in zip(alone, served, strict=True)]),
        "identical_ids": pair.identical(),
    }


def first_token(engine: Target, through: Target) -> dict[str, object]:
    """Time to the first token of one prompt of 16 tokens, in milliseconds."""
    pair = Pair()
    for seed in range(FIRST_TOKENS):
        pair.run(engine, through, [Request(p, 1) for p in prompts(1, 16, 1000 + seed, engine.description.vocabulary)])
    alone, served = ([run[0].ttft * 1000 for run in runs] for runs in (pair.engine, pair.through))
    return {
        "engine_ms": spread(alone),
        "suite_ms": spread(served),
        "added_ms": round(statistics.median(served) - statistics.median(alone), 3),
        "identical_ids": pair.identical(),
    }


def main() -> None:
    start_again_with_huge_pages()  # as the suite's executor does
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="which; all without it")
    arguments = parser.parse_args()
    options = {"--dtype": arguments.dtype, "--backend": arguments.backend, "--kv-cache-gib": str(arguments.kv_cache_gib)}
    with suite(arguments.model, *itertools.chain(*options.items()), "--no-prefix-cache") as served:
        through = GrpcTarget(served.grpc, model=None, prefix_cache=False, timeout=600)
        engine = EngineTarget(
            arguments.model,
            EngineOptions(
                dtype=arguments.dtype, backend=arguments.backend, kv_cache_gib=arguments.kv_cache_gib, prefix_cache=False
            ),
        )
        for target in (engine, through):
            warm(target)
        figures: dict[str, object] = {
            s.name: compare(engine, through, s, arguments.rounds) for s in named(tuple(arguments.scenario or SCENARIOS))
        }
        figures["first_token"] = first_token(engine, through)
        told = engine.description
        engine.close()
        through.close()
    report(
        "service_plane",
        {
            "model": arguments.model,
            "dtype": told.dtype,
            "backend": told.backend,
            "rounds": arguments.rounds,
            **figures,
        },
    )


if __name__ == "__main__":
    main()
