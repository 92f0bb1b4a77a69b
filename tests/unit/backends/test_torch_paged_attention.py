"""The project's own Triton kernels: their results by Triton's interpreter, and that its compilers take them for the devices they are for."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from penstock.backends.pytorch.attention.paged import Paged
from penstock.backends.pytorch.attention.plan import PrefillLayout
from penstock.backends.pytorch.attention.sdpa import GatheredDecoding, SdpaPrefilling

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
BLOCK = 16


def drawn(*shape):
    return torch.randn(*shape, device=DEVICE)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 64), (3, 1, 80), (2, 2, 16)])
@pytest.mark.parametrize("window", [None, 300])
@torch.inference_mode()
def test_a_long_past_is_read_in_parts(heads, kv_heads, dim, window):
    torch.manual_seed(0)
    width, past = 48, torch.tensor([760, 3, 511], device=DEVICE)
    queries, cache = drawn(3, heads, dim), drawn(2, 200, BLOCK, kv_heads, dim)
    table = torch.stack([torch.randperm(200)[:width] for _ in range(3)]).to(DEVICE)
    bounds = torch.stack((torch.zeros_like(past) if window is None else (past - window + 1).clamp_min(0), past), 1)
    right = GatheredDecoding(None, table, bounds).attend(queries, cache)
    for processors, parts in ((1, 1), (3 * kv_heads, 2)):
        paged = Paged(window, processors)
        assert paged.parts(3 * kv_heads, width * BLOCK) == parts
        found = paged.decoding(None, table, bounds).attend(queries, cache)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 20])
@torch.inference_mode()
def test_a_prompt_of_several_tiles_is_attended_behind_its_past(window):
    torch.manual_seed(1)
    past, new, heads, kv_heads, dim = 37, 70, 6, 2, 16
    blocks = np.random.default_rng(0).permutation(9)[: -(-(past + new) // BLOCK)].astype(np.int32)
    cache, queries = drawn(2, 9, BLOCK, kv_heads, dim), drawn(new, heads, dim)
    layout = PrefillLayout(slice(0, new), past, blocks, 0, window)
    keys, values = (kind[blocks].flatten(0, 1)[past : past + new] for kind in cache)
    right, found = (
        make(layout, torch.device(DEVICE)).attend(queries, keys, values, cache)
        for make in (SdpaPrefilling.masked, Paged(window, 4).prefilling)
    )
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)


def test_parts_are_as_many_as_the_device_has_work_for():
    paged = Paged(None, processors=132)
    assert paged.parts(8, 128) == 1  # too short to cut
    assert paged.parts(8, 8192) == 32
    assert paged.parts(64, 8192) == 4
    assert paged.parts(1000, 8192) == 1  # there is enough to do


COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from penstock.backends.pytorch.attention import paged

class Imitated:
    def get_current_target(self):
        return {"cuda": GPUTarget("cuda", 90, 32), "hip": GPUTarget("hip", "gfx942", 64)}[sys.argv[1]]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

class Compiling:
    "Compiles a kernel for what it is launched with, and launches nothing."

    def __init__(self, kernel):
        self.kernel, self.made = kernel, {}

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            made = self.kernel.warmup(*arguments, grid=grid, **constants)
            self.made[made.hash] = made
        return launch

driver.set_active(Imitated())
attend, join = paged.attend_part, paged.join_parts = Compiling(paged.attend_part), Compiling(paged.join_parts)
by = paged.Paged(None, processors=132)
for sequences, blocks, tokens in eval(sys.argv[2]):
    # As they lie in a step: queries beside keys, table and bounds in columns of one tensor.
    queries = torch.zeros(sequences, tokens, 8 + 4, 128, dtype=torch.bfloat16)[:, :, :8]
    cache, rows = torch.zeros(2, 9, 16, 2, 128, dtype=torch.bfloat16), torch.zeros(sequences, 5 + blocks, dtype=torch.int64)
    by.attend(queries, cache, rows[:, 5:], rows[:, 4])
for made in (*attend.made.values(), *join.made.values()):
    assert made.asm["cubin" if sys.argv[1] == "cuda" else "hsaco"]
    assert made.metadata.shared <= {"cuda": 99, "hip": 64}[sys.argv[1]] * 1024  # what the least of the devices has that are meant
print(len(attend.made), len(join.made))
"""


def compiled(tmp_path, kind, steps):
    """How many of either kernel are compiled for an imitated device that is asked for steps of (sequences, blocks, tokens each)."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, kind, str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


def test_steps_of_all_sizes_are_served_by_few_kernels(tmp_path):
    decodes = [(1, 1, 1), (1, 64, 1), (2, 64, 1), (7, 33, 1), (64, 16, 1), (256, 1, 1), (1, 257, 1), (3, 300, 1)]
    prefills = [(1, 1, 5), (1, 33, 64), (1, 33, 500), (1, 600, 17), (1, 12, 64)]
    # For either kind of step one that leaves the answer and one that leaves parts of it.
    assert compiled(tmp_path, "cuda", decodes + prefills) == (4, 1)


def test_a_compiler_for_amd_takes_the_kernels(tmp_path):
    assert compiled(tmp_path, "hip", [(1, 64, 1)]) == (1, 1)
