"""Which way of attending a device is quickest with, found by running each of them on keys and values drawn at random.

What raises, or differs from the same formulas on the processor, is left out: a library may have a kernel that this device has not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.pytorch.attention.plan import Attention, MakeDecoding, MakePrefilling, PrefillLayout
from penstock.backends.pytorch.attention.sdpa import GatheredDecoding, SdpaPrefilling
from penstock.backends.pytorch.timing import Timed

__all__ = ["ON_PROCESSOR", "Trial", "Ways", "choose", "ways_of"]

ON_PROCESSOR = Attention(GatheredDecoding, SdpaPrefilling.masked, ("gathered", "masked"))
"""On the processor nothing is measured: there all that is told to the library comes to one kernel of its, under a mask."""

# Root-mean-square error over the right answer's own, as the conformance suite has it.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
# Among these are shapes that read a past in parts and shapes that do not, so that kernels are compiled now and not in a step.
_DECODES = ((1, 4096), (16, 1024), (64, 256))  # sequences and tokens of each
_PREFILLS = ((0, 512), (1536, 512), (2032, 16))  # tokens that stand there, and new ones


@dataclass(frozen=True, slots=True)
class Ways:
    """What can be tried, by name. A way is made when it is tried, so that one whose library is broken is left out as any other."""

    decoding: Mapping[str, Callable[[], MakeDecoding]]
    prefilling: Mapping[str, Callable[[], MakePrefilling]]


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of a way: seconds for all that was asked, or why it was left out."""

    name: str
    seconds: float | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Case:
    """Something to attend to, and the answer in float32. `run` takes a way and gives what computes it."""

    run: Callable[[Any], Callable[[], Tensor]]
    right: Tensor


def ways_of(device: torch.device, window: int | None) -> Ways:
    """All there are for an accelerator: the library's, and the project's own kernels where Triton is installed."""
    decoding: dict[str, Callable[[], MakeDecoding]] = {"gathered": lambda: GatheredDecoding}
    prefilling: dict[str, Callable[[], MakePrefilling]] = {
        "masked": lambda: SdpaPrefilling.masked,
        "repeated": lambda: SdpaPrefilling.repeated,
        "lower_right": lambda: SdpaPrefilling.lower_right,
    }
    if importlib.util.find_spec("triton") is not None:
        decoding["paged"] = lambda: _paged(device, window).decoding
        prefilling["paged"] = lambda: _paged(device, window).prefilling
    return Ways(decoding, prefilling)


def choose(
    spec: DecoderSpec, dtype: torch.dtype, block_size: int, device: torch.device, ways: Ways, recorded: Timed, launched: Timed
) -> tuple[Attention, tuple[list[Trial], list[Trial]]]:
    """The quickest way for decoding and the quickest for prefill, and what became of each, quickest first.

    Args:
        spec: the model's shape.
        dtype: of queries and cache.
        block_size: tokens of a block.
        device: where all is computed.
        ways: what can be tried.
        recorded: times what is recorded once and replayed, as steps of decoding are.
        launched: times what is launched anew, as other steps are.

    Raises:
        RuntimeError: none of them gives the right answer here; the text has each one's reason.
    """
    random = _Random(spec, dtype, block_size, device)
    decodes = [random.decode(*sizes) for sizes in _DECODES]
    prefills = [random.prefill(*sizes) for sizes in _PREFILLS]
    tried = _try(ways.decoding, decodes, recorded), _try(ways.prefilling, prefills, launched)
    for kind, trials in zip(("decoding", "prefill"), tried, strict=True):
        if trials[0].seconds is None:
            reasons = "; ".join(f"{trial.name}: {trial.reason}" for trial in trials)
            raise RuntimeError(f"{device} computes no attention for {kind}: {reasons}")
    names = tried[0][0].name, tried[1][0].name
    return Attention(ways.decoding[names[0]](), ways.prefilling[names[1]](), names), tried


def _try(ways: Mapping[str, Callable[[], Any]], cases: Sequence[_Case], timed: Timed) -> list[Trial]:
    trials = [_trial(name, make, cases, timed) for name, make in ways.items()]
    return sorted(trials, key=lambda trial: float("inf") if trial.seconds is None else trial.seconds)


def _trial(name: str, make: Callable[[], Any], cases: Sequence[_Case], timed: Timed) -> Trial:
    seconds = 0.0
    try:
        way = make()
        for case in cases:
            found, taken = timed(case.run(way))
            error = float((found.cpu().float() - case.right).square().mean().sqrt() / case.right.square().mean().sqrt())
            if not error <= _TOLERANCE[found.dtype]:  # NaN neither
                return Trial(name, None, f"it is off by {error:.2g} of the answer's size")
            seconds += taken
    except Exception as error:  # noqa: BLE001  whatever a library raises, another way may do
        return Trial(name, None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
    return Trial(name, seconds)


class _Random:
    """Queries, keys and values drawn at random for a model's shape, in blocks that lie anywhere."""

    def __init__(self, spec: DecoderSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> None:
        self._spec, self._dtype, self._block, self._device = spec, dtype, block_size, device
        self._random = torch.Generator().manual_seed(0)

    def decode(self, sequences: int, tokens: int) -> _Case:
        """Sequences of one new token each, all of the same length."""
        tokens = min(tokens, self._spec.context_length)
        width = -(-tokens // self._block)
        table = torch.randperm(sequences * width, generator=self._random).view(sequences, width)
        window = self._spec.sliding_window
        bounds = torch.tensor([[0 if window is None else max(0, tokens - window), tokens - 1]]).expand(sequences, 2).contiguous()
        queries, cache = self._draw(sequences, self._spec.heads), self._cache(sequences * width)
        right = GatheredDecoding(None, table, bounds).attend(queries.float(), cache)
        there = [each.to(self._device) for each in (table, bounds, queries, cache)]

        def run(way: MakeDecoding) -> Callable[[], Tensor]:
            return partial(way(None, there[0], there[1]).attend, there[2], there[3])

        return _Case(run, right)

    def prefill(self, past: int, new: int) -> _Case:
        """One sequence with several new tokens behind others."""
        new = min(new, self._spec.context_length)
        past = min(past, self._spec.context_length - new)
        width = -(-(past + new) // self._block)
        blocks = torch.randperm(width, generator=self._random).numpy().astype(np.int32)
        layout = PrefillLayout(slice(0, new), past, blocks, 0, self._spec.sliding_window)
        cache, queries = self._cache(width), self._draw(new, self._spec.heads)
        keys, values = (kind[blocks].flatten(0, 1)[past : past + new] for kind in cache)
        right = SdpaPrefilling.masked(layout, torch.device("cpu")).attend(queries.float(), keys, values, cache)
        there = [each.to(self._device) for each in (queries, keys, values, cache)]

        def run(way: MakePrefilling) -> Callable[[], Tensor]:
            return partial(way(layout, self._device).attend, *there)

        return _Case(run, right)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self._spec.head_dim, generator=self._random).to(self._dtype)

    def _cache(self, blocks: int) -> Tensor:
        return self._draw(2, blocks, self._block, self._spec.kv_heads)


def _paged(device: torch.device, window: int | None) -> Any:
    from penstock.backends.pytorch.attention.paged import Paged

    return Paged.on(device, window)
