"""Penstock and the engines that it is compared with, in turn on the same work: ratios, and whether they meet their bars.

    python benchmarks/set_up_peers.py
    python benchmarks/against_peers.py MODEL [--peer NAME …] [--precision NAME …] [--scenario NAME …] [--backend NAME] [--rounds 5]

MODEL is a folder in Hugging Face's format; `random_checkpoint.py` writes the one that docs/benchmarks.md has figures of. A peer
loads once, in an environment and a process of its own; beside it runs first the whole suite, over gRPC, and then the engine in a
process. Every round is a run of each on the same prompts, the other one first every other time, never both at once. Prints tables
in Markdown; `--json FILE` keeps every figure. A peer that is not installed or fails is named with its reason, and the others go on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from measuring import machine, suite
from peers.bandwidth import Probe, bytes_read, compiled_probe
from peers.catalog import CONTESTS, PEERS, RUNNERS, Contest
from peers.contestants import Contestant, ContestantError, Runner, SuiteOverGrpc
from peers.environments import Environment
from peers.results import Comparison, as_fields, tables
from peers.rounds import compare
from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.checkpoint import read_model
from penstock.cli.bench.scenarios import SCENARIOS, named
from penstock.common.service import StartError

OURS = ("suite", "engine")
# Of one sequence alone it is known what has to be read.
ONE_SEQUENCE = "decode-b1"
KV_CACHE_GIB = 4


@contextlib.contextmanager
def of_ours(kind: str, model: Path, contest: Contest, peers: Path) -> Iterator[Contestant]:
    """The suite or the engine, loaded."""
    if kind == "suite":
        options = ["--backend", contest.backend, "--dtype", contest.dtype, "--kv-cache-gib", str(KV_CACHE_GIB), "--no-prefix-cache"]
        with (
            suite(str(model), *options, "--log-level", "warning") as running,
            contextlib.closing(SuiteOverGrpc(running.grpc, running.pid)) as through,
        ):
            yield through
    else:
        precision = f"{contest.backend}/{contest.dtype}"
        script = RUNNERS / "run_penstock.py"
        engine = Runner(Path(sys.executable), script, model, precision, peers / "penstock" / "converted")
        with contextlib.closing(engine):
            yield engine


def hold(contest: Contest, decoder: DecoderSpec, options: argparse.Namespace, probe: Probe | None) -> Iterator[Comparison]:
    """All scenarios of a contest, against each of ours.

    Raises:
        ContestantError, StartError, RuntimeError: one of them does not start or fails in its work.
    """
    environment = Environment.of(contest.peer, options.peers)
    if not environment.installed:
        raise ContestantError("not installed; python benchmarks/set_up_peers.py installs it or says why it can not")
    with contextlib.closing(
        Runner(environment.python, environment.peer.runner, options.model, contest.precision, environment.converted)
    ) as peer:
        told(f"{contest.peer} {peer.version} {contest.precision}: {peer.details}")
        for kind in options.ours or OURS:
            with of_ours(kind, options.model, contest, options.peers) as ours:
                for scenario in named(tuple(options.scenario or ())):
                    comparison = Comparison(contest, kind, scenario)
                    read = bytes_read(decoder, contest.backend, contest.dtype, scenario)
                    roof = probe if scenario.name == ONE_SEQUENCE else None
                    compare(comparison, peer, ours, options.rounds, decoder.vocabulary_size, roof, read)
                    told(json.dumps(as_fields(comparison)))
                    yield comparison


def told(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", type=Path, default=Path(".peers"), help="where set_up_peers.py installed them")
    parser.add_argument("--peer", action="append", choices=list(PEERS), help="which; all without it")
    parser.add_argument("--precision", action="append", choices=sorted({c.precision for c in CONTESTS}), help="of the peer")
    parser.add_argument("--scenario", action="append", choices=[s.name for s in SCENARIOS], help="which; all without it")
    parser.add_argument("--ours", action="append", choices=OURS, help="the suite over gRPC, the engine in process; both without it")
    parser.add_argument("--backend", help="of ours, in place of the one that the catalog names for a peer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for every figure")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds: must be above 0, and is {options.rounds}")
    options.peers, options.model = options.peers.resolve(), options.model.resolve()
    return options


def main() -> None:
    options = arguments()
    decoder = read_model(options.model, options.model.name).decoder
    probe = compiled_probe(options.peers)
    if probe is None:
        told("no C compiler: shares of the read bandwidth are left out")
    results: list[Comparison] = []
    failed: dict[str, str] = {}
    # Of contests that differ in our backend alone, one is left where a backend was chosen.
    for contest in dict.fromkeys(replace(listed, backend=options.backend or listed.backend) for listed in CONTESTS):
        if contest.peer in (options.peer or PEERS) and contest.precision in (options.precision or [contest.precision]):
            try:
                results.extend(hold(contest, decoder, options, probe))  # what came before an error stays
            except (ContestantError, StartError, RuntimeError) as error:
                name = f"{contest.peer} {contest.precision}, {contest.backend}"
                failed[name] = str(error)
                told(f"{name}: {error}")
    print(tables(results))
    for name, reason in failed.items():
        print(f"\n{name}: not measured: {reason}")
    if options.json is not None:
        figures = {"results": [as_fields(c) for c in results], "not_measured": failed, "machine": machine()}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    if not results:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
