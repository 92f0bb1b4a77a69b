"""A prefill executor written by hand, message by message: what it says to a decode executor may be wrong on purpose."""

import grpc.aio
import numpy as np
import xxhash

from penstock.common.proofs import proof
from penstock.executor.handoff.peers import Peer
from penstock.internal.v1 import handoff_pb2 as pb
from penstock.internal.v1 import handoff_pb2_grpc


def payload(ids):
    """KV of tokens, as the fake backend tells it: the bytes of their ids, as key and as value."""
    told = np.empty((1, 2, len(ids), 1, 4), np.float32)
    told[...] = np.asarray(ids, "<i4").view(np.uint8).reshape(len(ids), 1, 4)
    return told.tobytes()


class HandPeer:
    """One stream of it. What the scheduler would say of it is told by `register`."""

    def __init__(self, decode, channel, executor_id="hand"):
        self.decode, self.executor_id = decode, executor_id
        self.call = handoff_pb2_grpc.HandoffServiceStub(channel).Handoff()

    def register(self, *others):
        """Have the decode executor know it, and others."""
        fingerprint = self.decode.description.model_fingerprint
        self.decode.server._exchange.peers.update(Peer(i, "127.0.0.1:1", fingerprint) for i in (self.executor_id, *others))

    async def say(self, **message):
        await self.call.write(pb.HandoffRequest(**message))

    async def hear(self):
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF
        return getattr(answer, answer.WhichOneof("message"))

    async def introduce(self, **fields):
        described = self.decode.description
        introduce = {
            "executor_id": self.executor_id,
            "decode_executor_id": described.executor_id,
            "model_fingerprint": described.model_fingerprint,
            "transports": [pb.HANDOFF_TRANSPORT_GRPC],
            "proof": proof(self.decode.secret, fields.get("executor_id", self.executor_id)),
        }
        await self.say(introduce=pb.Introduce(**introduce | fields))
        return await self.hear()

    async def reserve(self, ticket, **fields):
        changed = pb.HandoffTicket()
        changed.CopyFrom(ticket)
        changed.MergeFrom(pb.HandoffTicket(**fields))
        await self.say(reserve=pb.Reserve(ticket=changed))
        return await self.hear()

    async def push(self, ticket, prompt, first, end, epoch=1, **fields):
        data = fields.pop("inline", payload(prompt[first:end]))
        push = {
            "handoff_id": ticket.handoff_id,
            "epoch": epoch,
            "first_token": first,
            "tokens": end - first,
            "form": pb.KV_FORM_CANONICAL,
            "dtype": "float32",
            "checksum": xxhash.xxh3_64_intdigest(data),
            "inline": data,
        }
        await self.say(push=pb.Push(**push | fields))
        return await self.hear()

    async def commit(self, ticket, token, epoch=1, **fields):
        commit = {"handoff_id": ticket.handoff_id, "epoch": epoch, "tokens": ticket.tokens, "first_token_id": token}
        await self.say(commit=pb.Commit(**commit | fields))
        return await self.hear()
