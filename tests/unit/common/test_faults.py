"""Fault points: nothing without arming; with it, what the folder's rules say, once, over all processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from penstock.common import faults
from penstock.common.faults import Action, Rule
from penstock.executor.handoff.words import Answer, Ask

PASSES = """
import sys
from pathlib import Path
from pathlib import Path
from penstock.common import faults
faults.arm(Path(sys.argv[1]))
for n in range(3):
    faults.reach("here")
    print(n, flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    faults.arm(tmp_path)
    yield tmp_path
    faults.disarm()


def rules(folder, *wanted):
    (folder / "new").write_text("".join(rule.line() + "\n" for rule in wanted))
    (folder / "new").replace(folder / faults.RULES)


def alter(action, message):
    return f"{action.value} {message}"


def send(*messages, point="sent", lane=None):
    return [out for message in messages for out in faults.through(point, message, alter, lane)]


def test_nothing_happens_unless_it_is_armed(tmp_path):
    rules(tmp_path, Rule("r", "sent", Action.LOSE))
    assert send("a", "b") == ["a", "b"]
    assert not list(tmp_path.glob(faults.FIRED + "*"))


@pytest.mark.parametrize(
    ("action", "out"),
    [
        (Action.LOSE, ["a", "c"]),
        (Action.DOUBLE, ["a", "b", "b", "c"]),
        (Action.CORRUPT, ["a", "corrupt b", "c"]),
        (Action.STALE, ["a", "stale b", "c"]),
        (Action.LATE, ["a", "c", "b"]),
    ],
)
def test_the_nth_message_is_treated_as_the_rule_says(folder, action, out):
    rules(folder, Rule("r", "sent", action, nth=2))
    assert send("a", "b", "c") == out
    told = json.loads((folder / "fired-r").read_text())
    assert (told["point"], told["action"]) == ("sent", action.value)
    assert told["pid"] == os.getpid()


def test_a_late_message_waits_for_its_time_and_for_another_of_its_lane(folder):
    rules(folder, Rule("r", "sent", Action.LATE, seconds=1e-9), Rule("never", "sent", Action.LATE, nth=2, seconds=1e9))
    assert send("a", lane=1) == []
    assert send("b", "c", lane=2) == ["c"]
    assert send("d", lane=1) == ["d", "a"]


def test_a_cut_is_an_error_of_the_connection(folder):
    rules(folder, Rule("r", "sent", Action.CUT))
    with pytest.raises(ConnectionError):
        send("a")
    assert send("a") == ["a"]


def test_rules_can_be_changed_and_are_obeyed_once(folder):
    rules(folder, Rule("one", "sent", Action.LOSE))
    assert send("a", "b") == ["b"]
    rules(folder, Rule("one", "sent", Action.LOSE), Rule("two", "sent", Action.LOSE), Rule("else", "sent", Action.LOSE, pid=1))
    assert send("a", "b") == ["b"]
    (folder / faults.RULES).unlink()
    assert send("a") == ["a"]


@pytest.mark.parametrize("line", ['{"id": "r"}', '{"id": "r", "point": "p", "action": "explode"}', '{"id": "r", "action": "lose"}'])
def test_a_wrong_rule_is_told(line):
    with pytest.raises(ValueError):
        Rule.parse(line)


def test_a_process_dies_at_its_point_and_the_next_one_does_not(tmp_path):
    rules(tmp_path, Rule("r", "here", Action.KILL, nth=2))
    told = [subprocess.run([sys.executable, "-c", PASSES, str(tmp_path)], stdout=subprocess.PIPE, check=False) for _ in range(2)]
    assert [(p.returncode, p.stdout.split()) for p in told] == [(-signal.SIGKILL, [b"0"]), (0, [b"0", b"1", b"2"])]


def test_a_process_stops_at_its_point_until_it_is_let_go_on(tmp_path):
    rules(tmp_path, Rule("r", "here", Action.STOP))
    process = subprocess.Popen([sys.executable, "-c", PASSES, str(tmp_path)], stdout=subprocess.PIPE)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[0].split() == [b"0", b"1", b"2"]


def test_every_point_stands_in_the_table_and_somewhere_in_the_code():
    root = Path(faults.__file__).parents[1]
    code = "".join(path.read_text() for path in root.rglob("*.py") if path.name != "faults.py")
    passed = set(re.findall(r'faults\.reach\("([^"]+)"\)', code))
    of_messages = {f"handoff.{message}.{where}" for message in faults.MESSAGES for where in ("sent", "received")}
    assert passed | of_messages == set(faults.POINTS)
    assert {word.__name__.lower() for word in (*get_args(Ask), *get_args(Answer))} == set(faults.MESSAGES)
