"""Random numbers by counter: no state, so that a replayed request draws the same, whatever runs beside it.

The mixing is SplitMix64's (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the golden
gamma as increment, and Stafford's variant 13 as finaliser, applied once for each part of the counter.
"""

from __future__ import annotations

__all__ = ["uniform"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def uniform(seed: int, position: int, attempt: int) -> float:
    """A number in [0, 1) with 53 random bits, for the `attempt`-th draw of the output token at `position`."""
    key = _mix((seed + _GAMMA) & _MASK)
    key = _mix((key ^ ((position + 1) * _GAMMA)) & _MASK)
    return (_mix((key + (attempt + 1) * _GAMMA) & _MASK) >> 11) * 2.0**-53
