"""Whom executors may exchange KV with, and in which role."""

import hmac

import grpc
import grpc.aio
import pytest
from scheduler_wire import WAIT, Executor, Gateway, description, eventually, ids_of, served, states

from penstock.internal.v1 import scheduler_pb2 as pb


async def test_an_executors_secret_stays_with_the_scheduler_and_peers_get_what_is_made_for_each():
    async with served() as stub:
        first = await Executor(stub, "e1", model_fingerprint="v1").ready()
        second = await Executor(stub, "e2", model_fingerprint="v1").ready()
        third = await Executor(stub, "e3", model_fingerprint="v1").ready()
        told = {peer.executor_id: peer.proof for peer in await first.peers("e2", "e3")}
        assert told == {"e2": hmac.digest(second.secret, b"e1", "sha256"), "e3": hmac.digest(third.secret, b"e1", "sha256")}
        assert {peer.executor_id: peer.proof for peer in await second.peers("e1", "e3")} == {
            "e1": hmac.digest(first.secret, b"e2", "sha256"),
            "e3": hmac.digest(third.secret, b"e2", "sha256"),
        }
        said = [await stub.ListExecutors(pb.ListExecutorsRequest()), await Gateway(stub).read()]
        for hidden in (first.secret, second.secret, third.secret, *told.values()):
            assert not any(hidden in message.SerializeToString() for message in said)


async def test_a_scheduler_that_has_just_started_takes_no_peer_away_until_executors_have_had_time_to_register():
    async with served(settle_seconds=2.0) as stub:
        first = Executor(stub, model_fingerprint="v1")
        told = (await first.read()).peers
        assert (ids_of(told), told.more) == ([], True)
        second = Executor(stub, "e2", model_fingerprint="v1")
        assert (await second.read()).peers.more
        while told.more or ids_of(told) != ["e2"]:
            response = await first.read()
            assert response is not grpc.aio.EOF
            told = response.peers if response.HasField("peers") else told


async def test_peers_are_the_live_executors_of_the_same_version_of_a_model():
    async with served() as stub:
        first = await Executor(stub, "e1", model_fingerprint="v1").ready()
        assert first.first_peers == []
        for other in ({"model_fingerprint": "v2"}, {"model": "n", "model_fingerprint": "v1"}, {}):
            stranger = await Executor(stub, f"stranger-{other.get('model_fingerprint')}-{len(other)}", **other).ready()
            assert stranger.first_peers == []
        second = await Executor(stub, "e2", model_fingerprint="v1").ready()
        assert second.first_peers == ["e1"]
        (peer,) = await first.peers("e2")
        assert (peer.address, peer.model_fingerprint) == (description("e2").address, "v1")
        second.send(pb.RegisterRequest(draining=True))
        third = await Executor(stub, "e3", model_fingerprint="v1").ready()
        assert third.first_peers == ["e1", "e2"], "what drains hands over still"
        await first.peers("e2", "e3")
        second.send(pb.RegisterRequest(stalled=True))
        await first.peers("e3")
        await third.peers("e1")


async def test_role_is_taken_on_when_the_executor_confirms_it():
    async with served() as stub:
        executor = await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        gateway.place(1)
        await gateway.grant()

        async def role():
            return (await states(stub))[0]["e1"].description.role

        assert await role() == pb.ROLE_BOTH
        await stub.SetRole(pb.SetRoleRequest(executor_id="e1", role=pb.ROLE_PREFILL), timeout=WAIT)
        assert await role() == pb.ROLE_BOTH
        assert await executor.confirm_role() == pb.ROLE_PREFILL
        await gateway.catalog("e1")

        async def taken_on():
            return await role() == pb.ROLE_PREFILL

        await eventually(taken_on)
        assert (await states(stub))[0]["e1"].leases == 1


async def test_role_of_the_description_holds_from_the_start():
    async with served() as stub:
        await Executor(stub, role=pb.ROLE_DECODE).ready()
        assert (await states(stub))[0]["e1"].description.role == pb.ROLE_DECODE


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ({"executor_id": "gone", "role": pb.ROLE_DECODE}, grpc.StatusCode.NOT_FOUND, "'gone'"),
        ({"executor_id": "e1"}, grpc.StatusCode.INVALID_ARGUMENT, "role: must be one of ROLE_BOTH, ROLE_PREFILL, ROLE_DECODE"),
        ({"executor_id": "e1", "role": 9}, grpc.StatusCode.INVALID_ARGUMENT, "role: must be one of"),
    ],
)
async def test_role_that_can_not_be_given_is_refused(asked, code, said):
    async with served() as stub:
        await Executor(stub).ready()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetRole(pb.SetRoleRequest(**asked), timeout=WAIT)
        assert caught.value.code() is code
        assert said in caught.value.details()


async def test_executor_of_an_unknown_role_is_refused_by_field():
    async with served() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=r"description\.role") as caught:
            await Executor(stub, role=9).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
