"""KV handed from one executor to another over real gRPC."""

import asyncio

from executor_pair import executor_pair, hand_over

from penstock.backends.fake import next_token
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import handoff_pb2


def expected(described, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, described.vocabulary_size))
    return ids[len(prompt) :]


async def test_a_sequence_is_prefilled_by_one_executor_and_decoded_by_the_other():
    async with executor_pair() as (prefill, decode):
        prompt = list(range(200))
        tokens = await hand_over(prefill, decode, 1, prompt, 8)
        assert tokens == expected(decode.description, prompt, 8)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
        assert decode.finished[1].reason == pb.SEQUENCE_FINISH_LENGTH
        assert prefill.tokens[1].keys() == {0}
        arrival = decode.arrived[1]
        assert arrival.transport == handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY
        assert arrival.kv_bytes == 200 * decode.description.kv_bytes_per_token
        await asyncio.gather(prefill.idle(), decode.idle())
