"""Whole sequences handed over by each transport, and by what is left where two executors allow different ones."""

from importlib.util import find_spec

import pytest
from executor_pair import executor_pair, hand_over

from penstock.backends.fake import next_token
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import handoff_pb2


def expected(described, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, described.vocabulary_size))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    ("prefill", "decode", "taken"),
    [
        (("grpc",), ("shared_memory", "grpc"), "GRPC"),
        (("shared_memory", "grpc"), ("shared_memory",), "SHARED_MEMORY"),
        pytest.param(
            ("nixl", "grpc"),
            ("nixl", "grpc"),
            "NIXL",
            marks=pytest.mark.skipif(find_spec("nixl") is None, reason="NVIDIA has no wheel of nixl for this system"),
        ),
    ],
)
async def test_the_cheapest_that_both_executors_allow_carries_the_kv(prefill, decode, taken):
    settings = {"handoff_lease_seconds": 30}  # NIXL's agents may take seconds to find each other
    async with executor_pair({"handoff_transports": prefill}, {"handoff_transports": decode}, **settings) as (one, other):
        prompt = list(range(150))
        assert await hand_over(one, other, 1, prompt, 6) == expected(other.description, prompt, 6)
        assert other.arrived[1].transport == handoff_pb2.HandoffTransport.Value(f"HANDOFF_TRANSPORT_{taken}")


async def test_executors_that_allow_nothing_in_common_fail_the_handoff_and_say_so():
    async with executor_pair({"handoff_transports": ("grpc",)}, {"handoff_transports": ("shared_memory",)}) as (one, other):
        await hand_over(one, other, 1, list(range(50)), 6)
        for side in (one, other):
            assert side.finished[1].reason == pb.SEQUENCE_FINISH_HANDOFF_FAILED
        assert "no transport" in one.finished[1].message
        await other.idle()
