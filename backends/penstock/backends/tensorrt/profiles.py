"""Optimisation profiles: the ranges of shapes that kernels are chosen for, and which of them a run takes.

Memory for activations is taken for a profile's largest shapes, so that the number of sequences, of their new tokens and of
their past can not all be large in one: a run of many sequences is of one new token each, and one of long pasts is of few
sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DeviceConfig
from penstock.backends.tensorrt.graph import cache_name

__all__ = ["PAST_STEP", "Profile", "Range", "choose", "make_profiles", "shapes"]

PAST_STEP = 64
"""Past lengths are rounded up to multiples of this, so that the shapes of a run, which cost something to change, change seldom."""

# Tokens of the past that the sequences of one run hold together, padding among them: a layer's keys and values of all are gathered.
_MOST_PAST = 1 << 18
# New tokens of a sequence that one run computes: attention scores are float32 [heads, new, past + new].
_MOST_NEW = 512
# A tensor of TensorRT holds fewer elements than this.
_MOST_ELEMENTS = 1 << 31
# Rows of the cache while kernels are timed, which is when the builder allocates one.
_USUAL_SLOTS = 1 << 12


@dataclass(frozen=True, slots=True)
class Range:
    """A dimension: its least, the one that kernels are timed for, its most."""

    least: int
    usual: int
    most: int


@dataclass(frozen=True, slots=True)
class Profile:
    """Ranges of the dimensions of a run: sequences, new tokens of each, past tokens of the longest."""

    batch: Range
    new: Range
    past: Range

    @property
    def most_tokens(self) -> int:
        """New tokens of the largest run."""
        return self.batch.most * self.new.most

    def admits(self, batch: int, new: int, past: int) -> bool:
        """Whether such a run is within its ranges."""
        dims = zip((batch, new, past), (self.batch, self.new, self.past), strict=True)
        return all(dim.least <= size <= dim.most for size, dim in dims)


def make_profiles(spec: DecoderSpec, config: DeviceConfig) -> tuple[Profile, ...]:
    """What a model that is to keep within `config` needs, the most particular first: `choose` takes the first that fits."""
    context = min(config.max_context or spec.context_length, spec.context_length)
    reach = min(context, spec.sliding_window or context)
    past = _range(reach, usual=1024)
    one = Range(1, 1, 1)
    profiles = [Profile(one, one, past)]
    if config.max_batch_size > 1:
        short = min(reach, max(PAST_STEP, _MOST_PAST // config.max_batch_size))
        profiles.append(Profile(_range(config.max_batch_size, usual=config.max_batch_size // 2), one, _range(short, usual=1024)))
        few = min(_MOST_PAST // reach, config.max_batch_size)
        if short < reach and few > 1:
            profiles.append(Profile(_range(few, usual=few), one, _range(reach, usual=reach // 2)))
    if config.max_batch_tokens > 1:
        new = min(_MOST_NEW, config.max_batch_tokens, context)
        profiles.append(Profile(one, _range(new, usual=new), past))
    return tuple(profiles)


def choose(profiles: Sequence[Profile], batch: int, new: int, past: int) -> int | None:
    """The index of the first profile that admits a run; None: no single run may be so large."""
    return next((i for i, profile in enumerate(profiles) if profile.admits(batch, new, past)), None)


def shapes(spec: DecoderSpec, profile: Profile) -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """The least, usual and largest shape of each input of the graph."""
    rows = spec.kv_heads * spec.head_dim
    slots = Range(1, _USUAL_SLOTS, (_MOST_ELEMENTS - 1) // rows)
    asked = Range(1, profile.batch.usual, profile.most_tokens)
    tokens, past = (profile.batch, profile.new), (profile.batch, profile.past)
    found = {"token_ids": tokens, "positions": tokens, "past_slots": past, "past_positions": past, "logits_rows": (asked,)}
    ranged = {name: _corners(dims) for name, dims in found.items()}
    cache = _corners((slots, Range(*[spec.kv_heads] * 3), Range(*[spec.head_dim] * 3)))
    return ranged | {cache_name(kind, layer): cache for layer in range(spec.layers) for kind in ("key", "value")}


def _range(most: int, usual: int) -> Range:
    return Range(1, max(1, min(usual, most)), most)


def _corners(dims: Sequence[Range]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return tuple(d.least for d in dims), tuple(d.usual for d in dims), tuple(d.most for d in dims)
