"""One end of a link through shared memory, in a process of its own; it does what stdin says and tells what came of it.

As JSON, a line each: `create`, `prove`, `open`, `attach`, `put`, `put_for_ever`, `close`. A process that is to be killed is killed while it
waits for the next line, or in the middle of a transfer that never ends.
"""

import asyncio
import json
import sys

from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.port import SharedPayload
from penstock.executor.handoff.transports.shared_memory import SharedIncoming, SharedOutgoing

WINDOW = 1 << 20
DATA = bytes(range(256)) * 1024


async def receive(end, do, asked):
    if do == "create":
        end = SharedIncoming(WINDOW)
        return end, {"name": end.offer.name, "size": end.offer.size, "proof": end.offer.proof.hex()}
    if do == "prove":
        return end, {"proven": end.prove(bytes.fromhex(asked["answer"]))}
    data = await end.open(SharedPayload(asked["offset"], asked["bytes"]), asked["checksum"])
    return end, {"same": bytes(data) == DATA}


async def send(end, do, asked):
    if do == "attach":
        segment = segments.attach(segments.SegmentOffer(asked["name"], asked["size"], bytes.fromhex(asked["proof"])))
        end = SharedOutgoing(segment)
        return end, {"answer": end.answer.hex()}
    parcel = await end.put(memoryview(DATA))
    if not asked.get("keep"):
        end.taken(parcel.payload)
    return end, {"offset": parcel.payload.offset, "bytes": parcel.payload.bytes, "checksum": parcel.checksum}


async def main():
    end = None
    for line in sys.stdin:
        asked = json.loads(line)
        do = asked.pop("do")
        told = {}
        if do == "close":
            end.close()
        elif do in {"create", "prove", "open"}:
            end, told = await receive(end, do, asked)
        elif do in {"attach", "put"}:
            end, told = await send(end, do, asked)
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        while do == "put_for_ever":
            await send(end, do, asked)


asyncio.run(main())
