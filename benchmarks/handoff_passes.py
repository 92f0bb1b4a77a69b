"""What each pass over KV costs by itself that a handoff through shared memory makes, beside a memcpy: the bounds of `handoff.py`.

    python benchmarks/handoff_passes.py [--mib 256] [--push-mib 16] [--window-mib 48] [--rounds 9]

One thread, a segment as two executors share it, and pieces one behind the other through its window. Beside them what gRPC has to go
through: a socket to another process of this host, written and read in pieces, with nothing made of them. Every figure is a median.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np

from measuring import report
from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.port import checksum
from penstock.executor.handoff.transports.shared_memory import copy_with_checksum

_MIB = 1 << 20


def measure(size: int, push: int, window: int, rounds: int) -> dict[str, float]:
    """GB/s of each pass, in turn."""
    kv, cache = np.ones(size, np.uint8), np.ones(size, np.uint8)
    segment, _ = segments.create(window)
    segment.unlink()
    shared = np.frombuffer(segment.payload, np.uint8)
    places = [(begin, begin % (window - window % push)) for begin in range(0, size - push + 1, push)]

    def write(begin: int, at: int) -> None:
        copy_with_checksum(shared[at : at + push].data, kv[begin : begin + push].data)

    def check(_: int, at: int) -> None:
        checksum(shared[at : at + push].data)

    def read(begin: int, at: int) -> None:
        np.copyto(cache[begin : begin + push], shared[at : at + push])

    def whole(_: int, at: int) -> None:  # noqa: ARG001 - once, whatever the place
        np.copyto(cache, kv)

    passes: dict[str, Callable[[int, int], None]] = {"written with its checksum": write, "checked": check, "read": read}
    taken = {name: _timed(one, places, rounds) for name, one in passes.items()}
    return {"memcpy": size / _timed(whole, places[:1], rounds) / 1e9} | {
        name: len(places) * push / seconds / 1e9 for name, seconds in taken.items()
    }


def through_a_socket(size: int, piece: int, rounds: int) -> float:
    """GB/s from one process to another over loopback."""
    data = memoryview(np.ones(piece, np.uint8))
    sizes = [piece] * (size // piece)
    with socket.create_server(("127.0.0.1", 0)) as server:
        reader = multiprocessing.Process(target=_read, args=(server.getsockname(), sum(sizes), piece, rounds))
        reader.start()
        with server.accept()[0] as connection:
            seconds = []
            for _ in range(rounds):
                began = time.perf_counter()
                for _ in sizes:
                    connection.sendall(data)
                connection.recv(1)  # all of it was read
                seconds.append(time.perf_counter() - began)
        reader.join()
    return sum(sizes) / statistics.median(seconds) / 1e9


def _read(address: tuple[str, int], size: int, piece: int, rounds: int) -> None:
    buffer = bytearray(piece)
    with socket.create_connection(address) as connection:
        for _ in range(rounds):
            left = size
            while left:
                left -= connection.recv_into(buffer, min(left, piece))
            connection.sendall(b"!")


def _timed(one: Callable[[int, int], None], places: list[tuple[int, int]], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        for place in places:
            one(*place)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--push-mib", type=int, default=16)
    parser.add_argument("--window-mib", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    rates = measure(asked.mib * _MIB, asked.push_mib * _MIB, asked.window_mib * _MIB, asked.rounds)
    passes = [rate for name, rate in rates.items() if name != "memcpy"]
    loopback = through_a_socket(asked.mib * _MIB, asked.push_mib * _MIB, asked.rounds)
    figures = {
        "gb_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "cpu_ms_per_gb": round(sum(1000 / rate for rate in passes)),
        "socket_gb_per_second": round(loopback, 2),
        "socket_of_memcpy": round(loopback / rates["memcpy"], 2),
        "two_cores_at_most_of_memcpy": round(2 / sum(1 / rate for rate in passes) / rates["memcpy"], 2),
    }
    report("handoff_passes", {"mib": asked.mib, "push_mib": asked.push_mib, "window_mib": asked.window_mib, **figures})


if __name__ == "__main__":
    main()
