"""What copies of messages and steps cost the C library."""

import subprocess
import sys

import pytest

PROGRAM = """
import platform, resource, sys
from penstock.common.heap import keep_freed_memory
kept = sys.argv[1] == "kept" and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):  # as a message is copied: three times over
    copies = [bytes([1]) * (4 << 20) for _ in range(3)]
    del copies
before = faults()
for _ in range(10):
    copies = [bytes([1]) * (4 << 20) for _ in range(3)]
    del copies
print(platform.libc_ver()[0] == "glibc", kept, faults() - before)
"""


def faults(what):
    run = subprocess.run([sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True, env={})
    glibc, kept, count = run.stdout.split()
    if glibc != "True":
        pytest.skip("the C library is not glibc")
    return kept == "True", int(count)


def test_a_message_is_copied_into_memory_that_the_one_before_it_has_left():
    kept, without = faults("kept"), faults("not kept")
    assert kept[0]
    assert kept[1] * 10 < without[1]
