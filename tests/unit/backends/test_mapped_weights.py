import gc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.backends.checkpoint import CheckpointError, Weights, read_model


def mapped(path):
    return Path("/proc/self/maps").read_text().count(str(path))


def test_views_are_the_files_bytes_in_their_own_type(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.bfloat16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float16)
    save_file(tensors, path)
    with Weights(read_model(checkpoint, "m")) as weights:
        assert set(weights) == set(tensors)
        assert weights["model.norm.weight"].dtype == ml_dtypes.bfloat16
        assert weights["lm_head.weight"].dtype == np.float16
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(weights[name].astype(np.float32), tensor.float().numpy())


def test_views_share_memory_and_are_read_only(checkpoint):
    with Weights(read_model(checkpoint, "m")) as weights:
        one, two = weights["model.norm.weight"], weights["model.norm.weight"]
        assert np.shares_memory(one, two)
        with pytest.raises(ValueError):
            one[0] = 1


def test_the_file_is_unmapped_with_its_last_view(checkpoint):
    path = checkpoint / "model.safetensors"
    weights = Weights(read_model(checkpoint, "m"))
    held = weights["model.norm.weight"]
    before = held.copy()
    weights.close()
    weights.close()
    assert mapped(path) == 1
    np.testing.assert_array_equal(held, before)
    del held
    gc.collect()
    assert mapped(path) == 0


def test_nothing_stays_open(checkpoint):
    spec = read_model(checkpoint, "m")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with Weights(spec) as weights:
            weights["model.norm.weight"].sum()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_file_that_went_is_told(checkpoint):
    spec = read_model(checkpoint, "m")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can not be read"):
        Weights(spec)
