"""A file is written whole, or stays what it was."""

import errno
import os

import pytest

from penstock.common.whole_files import write_whole


def test_it_takes_the_place_of_what_was_there(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    write_whole(path, b"after", memoryview(b" all"))
    assert path.read_bytes() == b"after all"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "no space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
