"""Requests whose prefill and decode are placed apart."""

import httpx
from scheduler_wire import Executor, Gateway, description, eventually, pools, scheduler, served, states, stub_of

from penstock.internal.v1 import scheduler_pb2 as pb


async def test_lease_names_both_executors_and_the_prefill_half_can_be_given_back_alone():
    async with served(placement="apart") as stub:
        await pools(stub, max_batch_size=1)
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
        assert (lease.executor_id, lease.address, lease.tokens) == ("d", description("d").address, 15)
        prefill = lease.prefill
        assert (prefill.executor_id, prefill.address, prefill.tokens) == ("p", description("p").address, 10)
        assert lease.reason == pb.PLACEMENT_REASON_POLICY

        async def leased():
            found, _ = await states(stub)
            return {name: (state.leases, state.prefill_leases) for name, state in found.items()}

        assert await leased() == {"p": (1, 1), "d": (1, 0)}
        gateway.send(pb.PlaceRequest(prefilled=[1]))

        async def given_back():
            return await leased() == {"p": (0, 0), "d": (1, 0)}

        await eventually(given_back)


async def test_reason_is_told_of_what_runs_together_too():
    async with served() as stub:
        await Executor(stub).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
        assert lease.reason == pb.PLACEMENT_REASON_NO_PREFILL_EXECUTOR
        assert not lease.HasField("prefill")


async def test_restarted_scheduler_takes_both_halves_of_a_lease_over():
    async with scheduler(placement="apart") as (address, _), stub_of(address) as stub:
        await pools(stub)
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
    async with scheduler(listen=address, settle_seconds=5.0) as (_, _), stub_of(address) as stub:
        gateway = Gateway(stub)
        gateway.send(pb.PlaceRequest(announced=[lease]))
        await pools(stub)

        async def taken_over():
            found, _ = await states(stub)
            return [(found[name].leases, found[name].prefill_leases) for name in "pd"] == [(1, 1), (1, 0)]

        await eventually(taken_over)


async def test_load_of_handoffs_is_heard_and_told():
    async with served() as stub:
        executor = await Executor(stub).ready()
        failing = [pb.FailingPeer(executor_id="e2", sends=True, failures=3)]
        load = pb.Load(running=1, receiving=2, sending=3, handoff_bytes_per_second=1e9, failing=failing)
        executor.send(pb.RegisterRequest(load=load))

        async def told():
            return (await states(stub))[0]["e1"].load == load

        await eventually(told)


async def test_metrics_tell_each_pool():
    async with scheduler(placement="apart", metrics="127.0.0.1:0") as (address, server), stub_of(address) as stub:
        prefill, _ = await pools(stub, kv_blocks=100, max_batch_size=1)
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2)
        prefill.send(pb.RegisterRequest(load=pb.Load(running=1, waiting=2, waiting_tokens=7, kv_blocks_free=25)))

        async def heard():
            found, queued = await states(stub)
            return found["p"].load.waiting == 2 and queued == 1

        await eventually(heard)
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://{server._metrics.address}/metrics")).text
    for line in (
        'penstock_scheduler_placed_total{how="apart",model_name="m",reason="policy"} 1.0',
        'penstock_scheduler_executors{model_name="m",role="prefill",state="live"} 1.0',
        'penstock_pool_leases{half="prefill",model_name="m",role="prefill"} 1.0',
        'penstock_pool_leases{half="decode",model_name="m",role="decode"} 1.0',
        'penstock_pool_requests_running{model_name="m",role="prefill"} 1.0',
        'penstock_pool_requests_waiting{model_name="m",role="prefill"} 2.0',
        'penstock_pool_waiting_prompt_tokens{model_name="m",role="prefill"} 7.0',
        'penstock_pool_queue{model_name="m",role="decode"} 1.0',
        'penstock_pool_leased_tokens{model_name="m",role="decode"} 15.0',
        'penstock_pool_kv_cache_usage_perc{model_name="m",role="prefill"} 0.75',
    ):
        assert line in text
