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
import inspect, sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from penstock.backends.pytorch.attention.paged_kernel import attend_part, join_parts

SIZES = dict(GROUP=4, GROUP_ROWS=4, STEP=64, DIM=128, DIM_COLUMNS=128, BLOCK=16, WINDOW=0, PART_ROWS=32)
FLOATS = {"sums": "*fp32", "maxima": "*fp32", "partial": "*fp32", "table": "*i64", "last_seen": "*i64", "scale": "fp32"}
FLOATS |= dict.fromkeys(("queries", "keys", "values"), "*bf16")

NVIDIA, AMD = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)

def check(kernel, target, **sizes):
    names = list(inspect.signature(kernel.fn).parameters)
    sizes = {name: (SIZES | sizes)[name] for name in names if name.isupper()}
    out = "*bf16" if sizes.get("WHOLE", True) else "*fp32"
    types = {name: "constexpr" if name in sizes else (FLOATS | {"out": out}).get(name, "i32") for name in names}
    made = compile(ASTSource(kernel, types, sizes), target=target)
    assert made.asm["cubin" if target.backend == "cuda" else "hsaco"]
    assert made.metadata.shared <= 64 * 1024, made.metadata.shared  # what every device has that is meant

check(attend_part, NVIDIA, ROWS=16, WHOLE=False)
check(attend_part, NVIDIA, ROWS=64, WHOLE=True)
check(join_parts, NVIDIA)
check(attend_part, AMD, ROWS=16, WHOLE=False)
"""


def test_compilers_for_nvidia_and_amd_take_the_kernels(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
