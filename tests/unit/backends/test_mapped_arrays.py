"""Computed weights in files: given back, kept for the next start, and never taken for whole when they are not."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from penstock.backends.mapped_arrays import MappedArrays, Unfitting, fitting, scratch_folder

RIGHT = {"one": np.arange(5000, dtype=np.int8).reshape(50, 100), "two": np.linspace(0, 1, 3000, dtype=np.float32)}


def fill(folder, kept=None):
    """As a start does: every array computed unless it was kept."""
    with MappedArrays(folder, kept) as arrays:
        found = {name: arrays.array(name, right.shape, right.dtype) for name, right in RIGHT.items()}
        computed = not arrays.complete
        if computed:
            for name, right in RIGHT.items():
                found[name][:] = right
        arrays.keep()
    return found, computed


def assert_right(found):
    for name, right in RIGHT.items():
        np.testing.assert_array_equal(found[name], right)


def resident(array):
    """KiB of an array's own pages that the process holds."""
    address, inside = array.__array_interface__["data"][0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            inside = low <= address < high
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


@pytest.mark.parametrize("asked", [("one", (51, 100)), ("three", (5000,))], ids=["size", "name"])
def test_kept_arrays_that_do_not_fit_are_computed_anew_once(tmp_path, asked):
    kept, starts = tmp_path / "model.arrays", []
    fill(tmp_path, kept)

    def start():
        with MappedArrays(tmp_path, kept) as arrays:
            starts.append(arrays.complete)
            arrays.array(*asked, np.int8)

    fitting(start)
    assert starts == [True, False]
    assert not kept.exists()
    with pytest.raises(Unfitting, match="elsewhere"):  # what no file can be blamed for is not tried for ever
        fitting(lambda: (_ for _ in ()).throw(Unfitting("elsewhere")))


def test_released_pages_are_no_longer_held_and_come_back_as_they_were(tmp_path):
    with MappedArrays(tmp_path) as arrays:
        array = arrays.array("one", (1 << 22,), np.uint8)
        array[:] = 7
        assert resident(array) == 4096
        arrays.release()
        assert resident(array) == 0
    assert np.all(array == 7)
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_is_not_computed_again(tmp_path):
    kept = tmp_path / "model.arrays"
    assert fill(tmp_path, kept)[1] is True
    found, computed = fill(tmp_path, kept)
    assert computed is False
    assert_right(found)
    assert [path.name for path in tmp_path.iterdir()] == ["model.arrays"]


@pytest.mark.parametrize("spoil", ["flip", "cut", "empty", "lengthen", "other"])
def test_a_damaged_file_is_replaced_by_a_whole_one(tmp_path, spoil):
    kept = tmp_path / "model.arrays"
    fill(tmp_path, kept)
    data = bytearray(kept.read_bytes())
    data[2000] ^= 1
    kept.write_bytes({"flip": data, "cut": data[:-9], "empty": b"", "lengthen": data + b"0", "other": b"x" * 9000}[spoil])
    found, computed = fill(tmp_path, kept)
    assert computed is True
    assert_right(found)
    assert fill(tmp_path, kept)[1] is False


def test_starts_at_the_same_time_keep_one_whole_file(tmp_path):
    kept, together = tmp_path / "model.arrays", threading.Barrier(4)

    def start(_):
        together.wait(timeout=30)
        return fill(tmp_path, kept)[0]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(start, range(4)):
            assert_right(found)
    assert [path.name for path in tmp_path.iterdir()] == ["model.arrays"]
    assert fill(tmp_path, kept)[1] is False


def test_a_file_system_without_nameless_files_keeps_them_too_and_leaves_no_other(tmp_path, monkeypatch):
    system = os.open

    def refuse(path, flags, *rest, **others):
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return system(path, flags, *rest, **others)

    monkeypatch.setattr(os, "open", refuse)
    kept = tmp_path / "model.arrays"
    with MappedArrays(tmp_path, kept) as unfinished:
        unfinished.array("one", (9000,), np.uint8)
    assert list(tmp_path.iterdir()) == []
    assert fill(tmp_path, kept)[1] is True
    found, computed = fill(tmp_path, kept)
    assert computed is False
    assert_right(found)
    assert [path.name for path in tmp_path.iterdir()] == ["model.arrays"]


def test_without_a_folder_to_write_to_arrays_lie_in_memory(tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_bytes(b"")
    found, computed = fill(blocked / "below", blocked / "below" / "model.arrays")
    assert computed is True
    assert_right(found)


def test_large_files_go_where_tmpdir_says_and_else_to_a_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert scratch_folder() == tmp_path
    monkeypatch.delenv("TMPDIR")
    assert scratch_folder() == Path("/var/tmp")


def test_kept_files_that_nothing_has_used_for_a_month_go_when_another_is_kept(tmp_path):
    old, used, left, young = tmp_path / "old.arrays", tmp_path / "used.arrays", tmp_path / ".new-left", tmp_path / ".new-young"
    for kept in (old, used):
        fill(tmp_path, kept)
    for folder in (left, young):
        folder.mkdir()
        (folder / "arrays").write_bytes(b"of a start that was killed")
    month = time.time() - 31 * 24 * 3600
    for path in (old, used, left):
        os.utime(path, (month, month))
    assert fill(tmp_path, used)[1] is False  # which counts as use
    fill(tmp_path, tmp_path / "new.arrays")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-young", "new.arrays", "used.arrays"]
