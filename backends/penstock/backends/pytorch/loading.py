"""Weights of a checkpoint as tensors: those of the right type on the CPU are views of its files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import ModelSpec
from penstock.backends.pytorch.decoder import Decoder
from penstock.backends.safetensors import Weights

__all__ = ["from_numpy", "load_decoder", "to_numpy"]

_LAYER_MODULES = {
    "input_norm": "input_norm.weight",
    "post_attention_norm": "post_attention_norm.weight",
    **{role: f"attention.{role}.weight" for role in ("q", "k", "v", "o", "q_norm", "k_norm")},
    **{f"{role}_bias": f"attention.{role}.bias" for role in ("q", "k", "v", "o")},
    **{role: f"feed_forward.{role}.weight" for role in ("gate", "up", "down")},
}


def load_decoder(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The decoder with its weights, each converted and moved only where it has to be."""
    with torch.device("meta"):
        decoder = Decoder(spec.decoder)
    with Weights(spec) as weights:
        state = {module: from_numpy(weights[name]).to(device=device, dtype=dtype) for module, name in _module_names(spec.decoder)}
    state.setdefault("lm_head.weight", state["embedding.weight"])
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(requires_grad=False)


def from_numpy(array: NDArray[Any]) -> Tensor:
    """A tensor on the array's own memory. It must not be written to where the array is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """An array on the memory of a tensor that is on the CPU."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    array: NDArray[Any] = tensor.numpy()
    return array


def _module_names(spec: DecoderSpec) -> Iterator[tuple[str, str]]:
    """Parameters of `Decoder` and the tensors that they are in the checkpoint."""
    names = spec.weights
    yield "embedding.weight", names.embedding
    yield "final_norm.weight", names.final_norm
    if names.lm_head is not None:
        yield "lm_head.weight", names.lm_head
    for role, module in _LAYER_MODULES.items():
        name: str | None = getattr(names.layer, role)
        if name is not None:
            yield from ((f"layers.{i}.{module}", name.format(layer=i)) for i in range(spec.layers))
