"""What is seen of a cluster: lines behind names for a person, and JSON alone for a machine."""

import errno
import io
import json

from penstock.cli.cluster.console import Console

LINE = '{"event": "listening", "service": "executor", "process": "decode-1", "level": "info", "timestamp": "2026-11-20T18:51:49.497687Z"}'


def lines(as_json, tell):
    tell(Console(stream := io.StringIO(), as_json=as_json))
    return stream.getvalue().splitlines()


def tell_all(console):
    console.line("up", "serving a model", event="serving", model="a")
    console.line("decode-1", "died (killed by SIGKILL)", level="warning", event="died", why="killed by SIGKILL")
    console.said("decode-1", "executor", LINE)
    console.said("decode-1", "executor", "{not JSON}")
    console.said("decode-1", "executor", "[1, 2]")
    console.said("decode-1", "executor", "")
    console.said("decode-1", "executor", 'Traceback (most recent call last): "é"')
    console.failed("decode-1 died 5 times")


def test_a_person_reads_each_line_behind_its_process():
    assert lines(False, tell_all) == [
        "up         | serving a model",
        "decode-1   | died (killed by SIGKILL)",
        f"decode-1   | {LINE}",
        "decode-1   | {not JSON}",
        "decode-1   | [1, 2]",
        "decode-1   | ",
        'decode-1   | Traceback (most recent call last): "é"',
        "penstock up: decode-1 died 5 times",
    ]


def test_a_machine_reads_an_object_a_line_and_what_is_none_is_wrapped():
    written = lines(True, tell_all)
    assert written[2] == LINE
    told = [json.loads(line) for line in written]
    assert all(line.pop("timestamp").endswith("Z") for line in told)
    printed = {"service": "executor", "process": "decode-1", "level": "warning"}
    assert told == [
        {"event": "serving", "model": "a", "service": "up", "level": "info"},
        {"event": "died", "why": "killed by SIGKILL", "service": "up", "process": "decode-1", "level": "warning"},
        {key: value for key, value in json.loads(LINE).items() if key != "timestamp"},
        {"event": "{not JSON}", **printed},
        {"event": "[1, 2]", **printed},
        {"event": 'Traceback (most recent call last): "é"', **printed},
        {"event": "failed", "why": "decode-1 died 5 times", "service": "up", "level": "error"},
    ]


class FullDisk(io.StringIO):
    full = True

    def write(self, text):
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(text)


def test_a_full_disk_costs_lines_and_whoever_passes_them_on_goes_on():
    console = Console(stream := FullDisk())
    console.said("decode-1", "executor", "lost")
    stream.full = False
    console.said("decode-1", "executor", "told")
    assert stream.getvalue() == "decode-1   | told\n"
