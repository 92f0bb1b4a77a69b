"""How many tokens the services carry: 64 streaming gRPC clients on a backend that computes nothing.

    python benchmarks/plumbing.py [--clients 64] [--tokens 1000]

Gateway, tokenizer, scheduler, executor and the clients all run on this machine. Each client has one stream; every token goes
through all of the suite: the executor's frames, incremental decoding to text, and the client's stream.
"""

from __future__ import annotations

import argparse

from measuring import report, spread, suite
from penstock.cli.bench.grpc_target import GrpcTarget
from penstock.cli.bench.measure import warm
from penstock.cli.bench.scenarios import Request, prompts
from penstock.cli.bench.timeline import latencies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1000, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    clients, tokens = arguments.clients, arguments.tokens
    options = ("--backend", "fake", "--max-batch-size", str(clients), "--kv-cache-gib", "1", "--no-prefix-cache")
    speeds, messages, runs = [], [], []
    with suite("builtin", *options) as served:
        target = GrpcTarget(served.grpc, model=None, prefix_cache=True, timeout=600)
        warm(target)
        for seed in range(arguments.rounds):
            work = [Request(prompt, tokens) for prompt in prompts(clients, 16, seed, target.description.vocabulary)]
            timelines = target.run(work, lambda: None)
            failed = [t.error for t in timelines if t.error]
            if failed:
                raise SystemExit(f"{len(failed)} of {clients} requests failed; the first: {failed[0]}")
            took = max(t.ended for t in timelines) - min(t.sent for t in timelines)
            speeds.append(clients * tokens / took)
            messages.append(sum(len(t.arrivals) for t in timelines) / took)
            runs.append(timelines)
        target.close()
    best = runs[speeds.index(max(speeds))]
    report(
        "plumbing",
        {"clients": clients, "tokens_each": tokens, "tok_s": spread(speeds), "messages_s": spread(messages), **latencies(best)},
    )


if __name__ == "__main__":
    main()
