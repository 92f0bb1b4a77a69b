"""Which of the conformance suite's checks run with which family of models."""

from penstock.backends.conformance import CHECKS, concurrency, leaks, lifecycle, limits, native
from penstock.backends.conformance.checkpoints import CONFIGS

# What these hold a backend to does not differ between families: they run with one.
OF_ANY_FAMILY = {name for room in (concurrency, leaks, lifecycle, limits, native) for name in room.__all__} | {
    "kv_travels_in_every_type"
}
CASES = [(family, check) for family in CONFIGS for check in CHECKS if family == "qwen3" or check not in OF_ANY_FAMILY]
