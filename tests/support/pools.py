"""A suite with a pool that prefills and one that decodes, in which faults can be set off, and what must be as before once they are over."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil
from history import Answer, Event, Fault, read
from suite import SERVICES, Suite, wait_for

from penstock.client import Client, PenstockError, Stream
from penstock.common.faults import FIRED, POINTS, RULES, Action, Rule
from penstock.internal.v1 import scheduler_pb2

# Of handoffs and of executors alike; what a fault has hit is decided within two of them.
LEASE = 2.5
BOUND = 2 * LEASE

ROLES = {"prefill": scheduler_pb2.ROLE_PREFILL, "decode": scheduler_pb2.ROLE_DECODE}


@dataclass(frozen=True)
class Fails:
    """What is to fail: as `penstock.common.faults.Rule`."""

    point: str
    action: Action
    nth: int = 1
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.action.value} {self.point}"


class Held(NamedTuple):
    """What a process holds a number of. `kind`: its service, and an executor's role."""

    kind: str
    pid: int
    what: str


class Armed:
    """Processes that were started with this folder for their faults, and that write their events into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events_file = folder / "events.jsonl"
        self._numbers = itertools.count(1)

    def members(self) -> list[psutil.Process]:
        """All of them that live."""
        raise NotImplementedError

    def arm(self, *faults: Fails) -> list[Rule]:
        """Have the next process that comes to a point fail there, for each of these; they replace what was armed before."""
        rules = []
        for fails in faults:
            assert fails.point in POINTS, fails.point
            name = f"{next(self._numbers)}-{uuid.uuid4().hex[:8]}"
            rules.append(Rule(name, fails.point, fails.action, fails.nth, fails.seconds))
        self._write_rules(rules)
        return rules

    def disarm(self) -> None:
        self._write_rules([])

    def _write_rules(self, rules: Iterable[Rule]) -> None:
        fresh = self.folder / f".{RULES}"
        fresh.write_text("".join(f"{rule.line()}\n" for rule in rules))
        fresh.replace(self.folder / RULES)

    def fired(self, rule: Rule) -> Fault | None:
        """What came of a rule, as soon as something has."""
        path = self.folder / f"{FIRED}{rule.id}"
        if not path.exists():
            return None
        told = json.loads(path.read_text())
        died = told["pid"] if rule.action is Action.KILL else 0
        return Fault(told["time"], f"{rule.action.value} at {rule.point}, process {told['pid']}", died)

    def stopped(self) -> list[psutil.Process]:
        """Processes that a rule has stopped."""
        return [process for process in self.members() if _is_stopped(process)]

    def let_go_on(self) -> None:
        for process in self.stopped():
            process.send_signal(signal.SIGCONT)

    def events(self) -> list[Event]:
        """The whole event log."""
        return read(self.events_file.read_text().splitlines()) if self.events_file.exists() else []


def configured(folder: Path, lease: float) -> Path:
    """Settings under which even short prompts take several steps and pushes."""
    settings = folder / "penstock.yaml"
    settings.write_text(
        f"scheduler:\n  placement: apart\n  lease_seconds: {lease}\n  metrics: 127.0.0.1:0\n"
        "tokenizer:\n  metrics: 127.0.0.1:0\n"
        f"executor:\n  metrics: 127.0.0.1:0\n  handoff_lease_seconds: {lease}\n  calibration_seconds: 0\n"
        "  handoff_push_mib: 0.25\n  handoff_window_mib: 8\n"
        "  max_batch_tokens: 160\n  max_batch_size: 32\n  prefill_chunk: 128\n  kv_cache_gib: 0.3\n"
    )
    return settings


class Pools(Armed, Suite):
    """`penstock up` with pools apart, every process of it armed.

    Args:
        folder: for rules, the event log and the configuration.
        lease: seconds of a handoff's lease.
    """

    def __init__(
        self, folder: Path, *, prefill: int = 1, decode: int = 1, lease: float = LEASE, arguments: Sequence[str] = ()
    ) -> None:
        Armed.__init__(self, folder)
        self._deaf: set[int] = set()
        settings = configured(folder, lease)
        pools = ("--prefill", str(prefill), "--decode", str(decode), "--threads", str(prefill + decode))
        flags = (*pools, "--config", str(settings), "--event-log", str(self.events_file), "--healthy-seconds", "0", *arguments)
        Suite.__init__(self, "builtin", "--dtype", "f32", *flags, environment={"PENSTOCK_FAULTS": str(folder)})

        # A process that is started again gets the address that the one before it had, but for its metrics.
        self._addresses = {name: Suite.address(self, name) for name in ("scheduler", "tokenizer")}

    def address(self, name: str) -> str:
        """Where a service that is no executor listens."""
        return self._addresses.get(name, self.grpc)

    def members(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children()

    def pool(self, role: str) -> list[psutil.Process]:
        """The processes of the registered executors with a role."""
        ports = {e.description.address.rpartition(":")[2] for e in self.executors() if e.description.role == ROLES[role]}
        return [p for p in self.services("executor") if _listens(p) & {int(port) for port in ports}]

    def whole(self, prefill: int, decode: int) -> bool:
        """Whether so many executors are registered, and the gateway serves."""
        roles = [e.description.role for e in self.executors() if not e.draining]
        return roles.count(ROLES["prefill"]) == prefill and roles.count(ROLES["decode"]) == decode and bool(self.gauges())

    def held(self) -> dict[Held, int]:
        """Descriptors, shared memory and tasks of every process; of the supervisor its descriptors."""
        found = {Held("up", self.process.pid, "descriptors"): psutil.Process(self.process.pid).num_fds()}
        for name in SERVICES:
            for process in self.services(name):
                kind = _kind(name, process)
                found[Held(kind, process.pid, "descriptors")] = process.num_fds()
                found[Held(kind, process.pid, "segments")] = _segments(process)
                found[Held(kind, process.pid, "tasks")] = self._tasks(process)
        return found

    def held_beyond(self, before: Mapping[Held, int]) -> dict[Held, tuple[int, int]]:
        """What a process holds more of than it did before, and both numbers; all there is of it, where nothing is known to compare with.

        One that was started since has no number of its own: its measure is the most that a process of its kind held before.
        """
        most: dict[tuple[str, str], int] = {}
        for key, count in before.items():
            most[key.kind, key.what] = max(count, most.get((key.kind, key.what), 0))
        measures = {key: (before.get(key, most.get((key.kind, key.what), 0)), now) for key, now in self.held().items()}
        return {key: (measure, now) for key, (measure, now) in measures.items() if now > measure}

    def _tasks(self, process: psutil.Process) -> int:
        """By the metric, from whichever of its ports tells it: a process that was started again has others than the suite told."""
        for port in sorted(_listens(process) - self._deaf):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                    lines = answer.read().decode().splitlines()
            except (http.client.HTTPException, OSError):
                self._deaf.add(port)  # gRPC's
                continue
            return next(int(float(line.split()[1])) for line in lines if line.startswith("penstock_tasks "))
        raise ConnectionError(f"process {process.pid} tells no metrics")

    def assert_back_to(self, before: Mapping[Held, int], timeout: float = 30) -> None:
        """Counts are zero, and nobody holds more than before."""
        self.assert_idle(timeout)
        assert wait_for(lambda: not self.held_beyond(before), timeout), f"held: {self.held_beyond(before)}"


class Clients:
    """Greedy requests whose undisturbed answers are known, each with a cache of its own so that all of its KV has to go over."""

    def __init__(self, address: str, prompts: Sequence[str], max_tokens: int) -> None:
        self._address, self._prompts, self._max_tokens = address, prompts, max_tokens
        self.expected = [Answer("", (), "")] * len(prompts)
        self.expected = self.ask_all(len(prompts))
        assert all(answer.error is None for answer in self.expected), self.expected

    def ask_all(self, count: int, meanwhile: Callable[[], None] = lambda: None) -> list[Answer]:
        """So many requests at once; what came of each, once all have ended."""
        answers: list[Answer] = [Answer("", (), "", error="hangs")] * count

        def run(number: int) -> None:
            answers[number] = self.ask(number % len(self._prompts))

        threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
        for thread in threads:
            thread.start()
        meanwhile()
        for thread in threads:
            thread.join(timeout=120)
        return answers

    def leave(self, count: int) -> None:
        """So many requests at once, whose clients all leave as soon as the first of them is told anything."""
        with Client(self._address, retries=0) as client:
            options = {"max_tokens": self._max_tokens, "temperature": 0.0, "ignore_eos": True, "timeout": 60}
            prompts = itertools.islice(itertools.cycle(self._prompts), count)
            streams = [client.generate(prompt, cache_salt=uuid.uuid4().hex, **options) for prompt in prompts]
            waiting = [threading.Thread(target=_read_some, args=(stream, streams)) for stream in streams]
            for thread in waiting:
                thread.start()
            for thread in waiting:
                thread.join(timeout=60)

    def ask(self, which: int) -> Answer:
        """One request: what its client sees of it."""
        name, ids, text, finish = uuid.uuid4().hex, [], "", None
        expected = self.expected[which]
        seen = Answer(name, expected.ids, expected.text)
        options = {"max_tokens": self._max_tokens, "temperature": 0.0, "ignore_eos": True, "token_ids": True}
        try:
            with (
                Client(self._address, retries=0) as client,
                client.generate(self._prompts[which], request_id=name, cache_salt=name, timeout=60, **options) as stream,
            ):
                for event in stream:
                    ids += event.token_ids
                    text += event.text
                    finish = event.finish.reason.value if event.finish else finish
        except PenstockError as error:
            return replace(seen, ids=ids, text=text, error=type(error).__name__, ended=time.monotonic())
        return replace(seen, ids=ids, text=text, finish=finish, ended=time.monotonic())


def _read_some(stream: Stream, streams: Sequence[Stream]) -> None:
    with contextlib.suppress(PenstockError):
        for _ in stream:
            break
    for other in streams:
        other.close()


def _is_stopped(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):  # ended since it was listed
        return process.status() == psutil.STATUS_STOPPED
    return False


def _kind(service: str, process: psutil.Process) -> str:
    """An executor is what it was started as: a restarted one is again."""
    line = process.cmdline()
    return f"{service} {line[line.index('--role') + 1]}" if "--role" in line else service


def _listens(process: psutil.Process) -> set[int]:
    return {c.laddr.port for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def _segments(process: psutil.Process) -> int:
    """Mappings of shared memory that handoffs use, named or not any more."""
    maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return sum("/dev/shm/" in line for line in maps)


# Counts of about 500 tokens: some blocks, several pushes, and every right answer follows from far back.
PROMPTS = [f"Count from {n}: " + " ".join(str(i) for i in range(n, n + 120)) for n in (101, 163, 230, 307, 388, 451, 520, 612)]
