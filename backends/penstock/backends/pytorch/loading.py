"""Weights of a checkpoint as tensors: those of the right type on the CPU are views of its files."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import ModelSpec
from penstock.backends.pytorch.decoder import Decoder
from penstock.backends.pytorch.precision import Precision
from penstock.backends.safetensors import Weights

__all__ = ["from_numpy", "load_decoder", "to_numpy"]

# Parameters of a layer, and the roles that are joined in them.
_LAYER_PARAMETERS = {
    "input_norm.weight": ("input_norm",),
    "post_attention_norm.weight": ("post_attention_norm",),
    "attention.qkv.weight": ("q", "k", "v"),
    "attention.qkv.bias": ("q_bias", "k_bias", "v_bias"),
    "attention.o.weight": ("o",),
    "attention.o.bias": ("o_bias",),
    "feed_forward.gate_up.weight": ("gate", "up"),
    "feed_forward.down.weight": ("down",),
}


def load_decoder(spec: ModelSpec, precision: Precision, device: torch.device) -> Decoder:
    """The decoder with its weights, each converted, joined and moved only where it has to be."""
    with torch.device("meta"):
        decoder = Decoder(spec.decoder)
    with Weights(spec) as weights, torch.inference_mode():
        _Loading(spec.decoder, weights, precision, device).fill(decoder)
    return decoder.eval().requires_grad_(requires_grad=False)


class _Loading:
    """A parameter is dropped from the host as soon as it is where, and in the form in which, it is used."""

    def __init__(self, spec: DecoderSpec, weights: Weights, precision: Precision, device: torch.device) -> None:
        self.spec, self.weights, self.precision, self.device = spec, weights, precision, device

    def fill(self, decoder: Decoder) -> None:
        names = self.spec.weights
        held, short = self.precision.activations, self.precision.held
        table = self.read((names.embedding,), short)
        _set(decoder, "embedding.weight", table)
        _set(decoder, "final_norm.weight", self.read((names.final_norm,), held))
        head = table if names.lm_head is None else self.read((names.lm_head,), short)
        decoder.lm_head = self.precision.head(head, None)
        for i, layer in enumerate(decoder.layers):
            self.fill_layer(layer, i)

    def fill_layer(self, layer: nn.Module, index: int) -> None:
        for path, roles in _LAYER_PARAMETERS.items():
            names = self.names(roles, index)
            module, kind = path.rsplit(".", 1)
            if kind == "bias" or not names:
                continue
            if "norm" in path:
                _set(layer, path, self.read(names, self.precision.activations))
                continue
            biases = self.names(_LAYER_PARAMETERS.get(f"{module}.bias", ()), index)
            bias = self.read(biases, self.precision.activations) if biases else None
            layer.set_submodule(module, self.precision.product(self.read(names, self.precision.held), bias))
        if self.spec.weights.layer.q_norm is not None:
            _set(layer, "attention.qk_norm.weight", self.head_norms(index))

    def head_norms(self, index: int) -> Tensor:
        """The weights of the queries' and the keys' norm, for each head: [heads + kv heads, head dim]."""
        each = (self.read(self.names((role,), index), self.precision.activations) for role in ("q_norm", "k_norm"))
        counts = (self.spec.heads, self.spec.kv_heads)
        return torch.cat([weight.expand(count, -1) for weight, count in zip(each, counts, strict=True)])

    def names(self, roles: Iterable[str], index: int) -> list[str]:
        found = [getattr(self.spec.weights.layer, role) for role in roles]
        return [name.format(layer=index) for name in found if name is not None]

    def read(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """These tensors, end to end where they are several. One that is of this type on the CPU is a view of its file."""
        parts = [from_numpy(self.weights[name]).to(device=self.device, dtype=dtype) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def _set(module: nn.Module, path: str, value: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


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
