"""How fast KV goes from one process to another, beside a copy of the same bytes within one.

    python benchmarks/handoff.py --mib 64 --rounds 15

What is timed is a whole handoff over the executors' own stream: from "all KV is there" in the sending process, over Reserve, every
Push with its checksum computed on one side and again on the other, the import of each into the receiving process's array, and
Commit, to the Ack. The sequence's KV lies in one array in each process, both touched before. memcpy is numpy's copy of the same
bytes between two such arrays, by one thread. Transports and memcpy take turns; every figure is a median over rounds. Processor time
is that of all threads of a process, and depends little on what else the machine does.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from handoff_ends import DECODE, SECRET, End, kv_spec, receive
from measuring import report
from penstock.common.proofs import proof
from penstock.executor.handoff.peers import Peer
from penstock.executor.handoff.ticket import Ticket, Transport
from penstock.executor.handoff.transports import sizes

_MIB = 1 << 20


async def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each round, by transport and of memcpy."""
    blocks = -(-asked.mib * _MIB // kv_spec(1).bytes_per_block)
    for transport in sizes.PUSH_BYTES if asked.push_mib else ():
        sizes.PUSH_BYTES[transport] = int(asked.push_mib * _MIB)
    window, push = asked.window_mib * _MIB, 32 * _MIB
    transports = [Transport(name) for name in asked.transports]
    prefill = {each: End(f"prefill-{each.value}", blocks, [each], window, push) for each in transports}
    with _receiver(asked, [f"prefill-{each.value}" for each in transports]) as other:
        assert other.stdin is not None  # noqa: S101 - pipes were asked for
        assert other.stdout is not None  # noqa: S101 - the same
        address = other.stdout.readline().strip()
        seconds: dict[str, list[float]] = {"memcpy": [], **{each.value: [] for each in transports}}
        cpu: dict[str, list[tuple[float, float]]] = {name: [] for name in seconds}
        receiver = psutil.Process(other.pid)
        first = next(iter(prefill.values())).engine.memory
        copy = np.zeros_like(first)
        for number in range(asked.rounds + 2):
            before = _cpu(receiver)
            seconds["memcpy"].append(_memcpy(copy, first))
            cpu["memcpy"].append(_since(before, receiver))
            for transport, end in prefill.items():
                executor_id = f"prefill-{transport.value}"
                end.exchange.peers.update([Peer(DECODE, address, "a fingerprint", proof(SECRET, executor_id))])
                print(executor_id, file=other.stdin, flush=True)
                told = json.loads(other.stdout.readline())
                ticket = Ticket(bytes.fromhex(told["handoff_id"]), DECODE, executor_id, 0, told["tokens"], 30.0)
                before, began = _cpu(receiver), time.perf_counter()
                how = await end.hand_over(ticket)
                seconds[transport.value].append(time.perf_counter() - began)
                cpu[transport.value].append(_since(before, receiver))
                if how != "handed off":
                    raise RuntimeError(f"{transport.value}: {how}")
            if number == 1:
                for taken in (*seconds.values(), *cpu.values()):
                    taken.clear()  # connecting, and the first touch of the transports' memory
        for end in prefill.values():
            await end.exchange.close()
        other.stdin.close()
        other.wait(30)
    return {"bytes": first.nbytes, "seconds": seconds, "cpu": cpu}


def _receiver(asked: argparse.Namespace, executor_ids: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__)), "--mib", str(asked.mib), "--window-mib", str(asked.window_mib)]
    return subprocess.Popen([*command, "--receive", *executor_ids], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _cpu(receiver: psutil.Process) -> tuple[float, float]:
    used = receiver.cpu_times()
    return time.process_time(), used.user + used.system


def _since(before: tuple[float, float], receiver: psutil.Process) -> tuple[float, float]:
    now = _cpu(receiver)
    return now[0] - before[0], now[1] - before[1]


def _memcpy(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> float:
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians: GB/s, and how many times the time of the round's memcpy goes into it."""
    copies = measured["seconds"]["memcpy"]
    told = {}
    for name, taken in measured["seconds"].items():
        ratio = statistics.median(copy / one for copy, one in zip(copies, taken, strict=True))
        rate = measured["bytes"] / statistics.median(taken) / 1e9
        best = min(copies) / min(taken)
        send, receive = (statistics.mean(each) / measured["bytes"] * 1e9 for each in zip(*measured["cpu"][name], strict=True))
        told[name] = {"gb_per_second": round(rate, 2), "of_memcpy": round(ratio, 3), "of_memcpy_best": round(best, 3)}
        told[name] |= {"cpu_ms_per_gb": {"sending": round(1000 * send), "receiving": round(1000 * receive)}}
    return told


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="KV of the sequence, rounded up to whole blocks")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--window-mib", type=int, default=48)
    parser.add_argument("--push-mib", type=float, help="size of one push, instead of the transport's own")
    parser.add_argument("--transports", nargs="*", default=["shared_memory", "grpc"], choices=[each.value for each in Transport])
    parser.add_argument("--receive", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.receive is not None:
        blocks = -(-asked.mib * _MIB // kv_spec(1).bytes_per_block)
        asyncio.run(receive(blocks, asked.receive, asked.window_mib * _MIB, 32 * _MIB))
        return
    measured = asyncio.run(measure(asked))
    report(Path(__file__).stem, {"mib": measured["bytes"] / _MIB, "window_mib": asked.window_mib, **figures(measured)})


if __name__ == "__main__":
    main()
