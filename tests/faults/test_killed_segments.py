"""Shared memory of two real processes of which one is killed: nothing of it stays, and the other goes on."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from suite import wait_for

from penstock.executor.handoff.transports import segments

END = str(Path(__file__).with_name("segment_end.py"))


class End:
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, END], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, do, **facts):
        self.process.stdin.write(json.dumps({"do": do} | facts) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self):
        self.process.kill()
        self.process.communicate()

    @property
    def holds(self):
        """Its descriptors and mappings of segments."""
        process = psutil.Process(self.process.pid)
        fds = [entry.readlink() for entry in Path(f"/proc/{process.pid}/fd").iterdir()]
        maps = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
        return [str(held) for held in [*fds, *maps] if "/dev/shm/" in str(held)]

    def held_in_the_end(self):
        """What it does not let go of: the thread that has copied has its view for a moment after the loop goes on."""
        wait_for(lambda: not self.holds)
        return self.holds


@pytest.fixture
def end():
    started = []

    def start():
        started.append(End())
        return started[-1]

    yield start
    for one in started:
        one.kill()


def exists(offer):
    return (segments.FOLDER / offer["name"]).exists()


def test_a_receiver_killed_before_anyone_attached_is_swept_by_the_next_segment(end):
    receiver = end()
    offer = receiver.ask("create")
    assert exists(offer)
    receiver.kill()
    assert exists(offer)
    another = end()
    other = another.ask("create")
    assert not exists(offer)
    assert exists(other)  # its owner lives
    another.ask("close")
    assert another.held_in_the_end() == []


def test_a_receiver_killed_before_it_heard_of_the_attaching_is_swept_by_the_sender(end):
    receiver, sender = end(), end()
    offer = receiver.ask("create")
    sender.ask("attach", **offer)
    receiver.kill()
    sender.ask("close")
    assert not exists(offer)
    assert sender.held_in_the_end() == []


def test_a_sender_killed_before_it_told_its_proof_leaves_nothing(end):
    receiver, sender = end(), end()
    offer = receiver.ask("create")
    sender.ask("attach", **offer)
    sender.kill()
    receiver.ask("close")
    assert not exists(offer)
    assert receiver.held_in_the_end() == []


@pytest.fixture
def linked(end):
    receiver, sender = end(), end()
    offer = receiver.ask("create")
    assert receiver.ask("prove", **sender.ask("attach", **offer)) == {"proven": True}
    assert not exists(offer)
    return sender, receiver, offer


def test_a_sender_killed_in_the_middle_of_a_transfer_leaves_what_it_had_told(linked):
    sender, receiver, _ = linked
    told = sender.ask("put", keep=True)
    sender.ask("put_for_ever")
    sender.kill()
    assert receiver.ask("open", **told) == {"same": True}
    receiver.ask("close")
    assert receiver.held_in_the_end() == []


def test_a_receiver_killed_in_the_middle_of_a_transfer_takes_nothing_of_the_sender_with_it(linked):
    sender, receiver, _ = linked
    sender.ask("put", keep=True)
    receiver.kill()
    sender.ask("put")
    sender.ask("close")
    assert sender.held_in_the_end() == []


def test_both_killed_leave_nothing(linked):
    sender, receiver, offer = linked
    sender.ask("put_for_ever")
    for one in (sender, receiver):
        one.kill()
    assert not exists(offer)
