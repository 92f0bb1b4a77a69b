import subprocess
import sys

import pytest

from penstock.cli.huge_pages import computes, with_huge_pages

ASK = "from penstock.cli.huge_pages import *; start_again_with_huge_pages(); import os, sys; print(os.environ['GLIBC_TUNABLES'], os.getpid(), sys.argv[1:])"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("executor --model x", True),
        ("bench engine x", True),
        ("calibrate x", True),
        ("bench serve", False),
        ("up builtin", False),
        ("", False),
    ],
)
def test_what_computes_in_its_own_process(arguments, expected):
    assert computes(arguments.split()) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_process_starts_again_as_itself_and_once():
    environment = {"GLIBC_TUNABLES": "glibc.malloc.check=0"}
    process = subprocess.Popen([sys.executable, "-c", ASK, "a b", "c"], env=environment, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=30)
    assert out.strip() == f"glibc.malloc.check=0:glibc.malloc.hugetlb=1 {process.pid} ['a b', 'c']"


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_what_somebody_chose_stands():
    assert with_huge_pages({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None
