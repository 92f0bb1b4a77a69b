"""What the prefix cache gives and what it costs, in the engine.

    python benchmarks/prefix_cache.py MODEL [--dtype int8] [--rounds 5]

Gain: time to the first token of a prompt of 2,000 tokens of which 95 % stand in the cache, over that of one of which none does.
Cost: time for prompts that share nothing, with the cache over without, in turn on two engines in this process.
"""

from __future__ import annotations

import argparse
import statistics

from measuring import report, spread
from penstock.cli.bench.engine_target import EngineOptions, EngineTarget
from penstock.cli.bench.measure import warm
from penstock.cli.bench.scenarios import Request, named, prompts

PROMPT = 2000
CACHED = 1900


def first_token(engine: EngineTarget, prompt: list[int]) -> float:
    (timeline,) = engine.run([Request(prompt, 1)], lambda: None)
    if timeline.error is not None:
        raise SystemExit(timeline.error)
    return timeline.ttft


def gain(engine: EngineTarget, rounds: int) -> dict[str, object]:
    vocabulary = engine.description.vocabulary
    cold, warm_ = [], []
    for seed in range(rounds):
        prefix, other = prompts(2, CACHED, 100 + seed, vocabulary)
        tails = prompts(2, PROMPT - CACHED, 200 + seed, vocabulary)
        cold.append(first_token(engine, other + tails[0]))
        first_token(engine, prefix)
        warm_.append(first_token(engine, prefix + tails[1]))
    return {
        "uncached_ttft_ms": spread([s * 1000 for s in cold]),
        "cached_ttft_ms": spread([s * 1000 for s in warm_]),
        "ratio": round(statistics.median(warm_) / statistics.median(cold), 4),
    }


def cost(caching: EngineTarget, plain: EngineTarget, name: str, rounds: int) -> dict[str, object]:
    (scenario,) = named([name])
    taken: dict[EngineTarget, list[float]] = {caching: [], plain: []}
    # A run of one request is short, and its time uncertain: it is done more often.
    for seed in range(rounds * (4 if scenario.requests == 1 else 1)):
        order = [caching, plain] if seed % 2 else [plain, caching]
        for engine in order:
            timelines = engine.run(scenario.work(5000 + seed, engine.description.vocabulary), lambda: None)
            taken[engine].append(max(t.ended for t in timelines) - min(t.sent for t in timelines))
    by_round = [a / b for a, b in zip(taken[caching], taken[plain], strict=True)]
    return {
        "with_s": spread(taken[caching]),
        "without_s": spread(taken[plain]),
        "ratio_of_best": round(min(taken[caching]) / min(taken[plain]), 4),
        "ratio_by_round": spread(by_round),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kv-cache-gib", type=float, default=2.0)
    parser.add_argument("--scenario", action="append", help="of work without hits; prefill-512 and mixed-b16 without it")
    arguments = parser.parse_args()
    caching, plain = (
        EngineTarget(
            arguments.model,
            EngineOptions(
                dtype=arguments.dtype, backend=arguments.backend, kv_cache_gib=arguments.kv_cache_gib, prefix_cache=cache
            ),
        )
        for cache in (True, False)
    )
    for engine in (caching, plain):
        warm(engine)
    description = caching.description
    figures = {
        "model": arguments.model,
        "dtype": description.dtype,
        "backend": description.backend,
        "prompt_tokens": PROMPT,
        "cached_share": CACHED / PROMPT,
        "gain": gain(caching, arguments.rounds),
        "cost_without_hits": {
            name: cost(caching, plain, name, arguments.rounds) for name in arguments.scenario or ("prefill-512", "mixed-b16")
        },
    }
    caching.close()
    plain.close()
    report("prefix_cache", figures)


if __name__ == "__main__":
    main()
