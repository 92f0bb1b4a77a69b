"""Products on an accelerator with weights of four bits and bfloat16 activations.

PyTorch's kernel for them (``_weight_int4pack_mm``) wants the weights packed by PyTorch in an order of its own, another on AMD's
devices than on NVIDIA's, and gives no way back. The way back is found here by packing numbers that tell their own places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from penstock.backends.pytorch.products import HostProduct, four_bits

__all__ = ["DeviceInt4Product", "Packing", "packing"]

_TILE = 4096  # outputs that are widened at a time; whole tiles of any packing
_INPUT_TILE = 16  # inputs in a tile of the kernel, of which it packs up to eight behind one another
_OUTPUT_TILES = (8, 16)  # outputs in one: NVIDIA's, AMD's
_SHIFTS = (0, 4, 8, 12)  # of the digits of a number, four bits each


class DeviceInt4Product(HostProduct):
    """A linear map of bfloat16 activations, [T, inputs] to [T, outputs], with a scale and an offset for each group of inputs.

    Up to `rows` go through PyTorch's kernel for it; more are multiplied with the weight widened. With none the weight is held in
    plain order, two inputs to a byte.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        codes, scales, self._group = four_bits(weight)
        pairs = _pairs(codes)
        self._packing = packing(weight.device, _inner_tiles(weight.shape[1])) if rows else None
        super().__init__(self._packing.pack(pairs) if self._packing else pairs, bias)
        self.register_buffer("scales", scales)
        self.rows = rows

    def product(self, x: Tensor) -> Tensor:
        """The product alone."""
        return self.by_kernel(x) if 0 < len(x) <= self.rows else self.widened(x)

    def by_kernel(self, x: Tensor) -> Tensor:
        """By PyTorch's own kernel."""
        return torch._weight_int4pack_mm(x.contiguous(), self.weight, self._group, self.scales)  # noqa: SLF001  it has no other name

    def widened(self, x: Tensor) -> Tensor:
        """With the weight in the activations' type."""
        outputs, inputs = self.scales.shape[1], x.shape[1]
        parts = []
        for first in range(0, outputs, _TILE):
            codes = self._codes(first, min(first + _TILE, outputs), inputs)
            scale, middle = self.scales[:, first : first + _TILE].unbind(2)
            grouped = codes.view(len(codes), -1, self._group).to(x.dtype) - 8
            parts.append(functional.linear(x, (grouped * scale.t()[:, :, None] + middle.t()[:, :, None]).flatten(1)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _codes(self, first: int, end: int, inputs: int) -> Tensor:
        """Of these outputs, uint8 [outputs, inputs]."""
        if self._packing is None:
            return _unpaired(self.weight[first:end])
        return self._packing.unpack(self.weight[first // _OUTPUT_TILES[0] : end // _OUTPUT_TILES[0]], inputs)


@dataclass(frozen=True, slots=True)
class Packing:
    """The order in which PyTorch packs weights of four bits for its kernel on a device.

    Attributes:
        inner_tiles: tiles of inputs behind one another: 2, 4 or 8.
        outputs: rows of a tile.
        places: int64, for each weight of a tile, [outputs, 16 * inner tiles] in a row, which half byte of the packed tile has it.
    """

    inner_tiles: int
    outputs: int
    places: Tensor

    def pack(self, pairs: Tensor) -> Tensor:
        """What the kernel takes, of uint8 [outputs, inputs / 2], two codes to a byte."""
        return _packed(pairs, self.inner_tiles)

    def unpack(self, packed: Tensor, inputs: int) -> Tensor:
        """The codes again, uint8 [outputs, inputs], of whole tiles."""
        columns = _INPUT_TILE * self.inner_tiles
        tiles = _halves(packed).view(-1, inputs // columns, self.outputs * columns)[:, :, self.places]
        return tiles.view(-1, inputs // columns, self.outputs, columns).transpose(1, 2).reshape(-1, inputs)


@cache
def packing(device: torch.device, inner_tiles: int) -> Packing:
    """The order on this device.

    Raises:
        RuntimeError: the device has no such kernel, or packs in a way that is not made of tiles.
    """
    rows, columns = 2 * max(_OUTPUT_TILES), 2 * _INPUT_TILE * inner_tiles
    own = torch.arange(rows * columns, device=device).view(rows, columns)
    digits = [_packed(_pairs(own >> shift), inner_tiles) for shift in _SHIFTS]
    there = torch.stack([_halves(digit).long() << shift for digit, shift in zip(digits, _SHIFTS, strict=True)]).sum(0)
    for outputs in _OUTPUT_TILES:
        width = columns // 2
        row, column = there[: outputs * width] // columns, there[: outputs * width] % columns
        if int(row.max()) < outputs and int(column.max()) < width:
            found = Packing(inner_tiles, outputs, torch.argsort(row * width + column))
            if all(
                torch.equal(found.unpack(digit, columns), _low(own >> shift)) for digit, shift in zip(digits, _SHIFTS, strict=True)
            ):
                return found
    raise RuntimeError("PyTorch packs weights of four bits in an order that is not known")


def _inner_tiles(inputs: int) -> int:
    """As many as divide the inputs: the kernel reads as much at a time."""
    return next(count for count in (8, 4, 2) if inputs % (count * _INPUT_TILE) == 0)


def _packed(pairs: Tensor, inner_tiles: int) -> Tensor:
    return torch._convert_weight_to_int4pack(pairs, inner_tiles)  # noqa: SLF001  it has no other name


def _pairs(codes: Tensor) -> Tensor:
    """Two neighbours to a byte, the first in its upper half, as PyTorch packs them: uint8 [outputs, inputs / 2]."""
    low = _low(codes)
    return low[:, ::2] << 4 | low[:, 1::2]


def _unpaired(pairs: Tensor) -> Tensor:
    return torch.stack((pairs >> 4, pairs & 15), dim=2).flatten(1)


def _halves(packed: Tensor) -> Tensor:
    """The half bytes of a packed weight in a row, the lower of each byte first: uint8."""
    whole = packed.reshape(-1).view(torch.uint8)
    return torch.stack((whole & 15, whole >> 4), dim=1).flatten()


def _low(codes: Tensor) -> Tensor:
    return (codes & 15).to(torch.uint8)
