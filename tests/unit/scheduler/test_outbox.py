"""What was added is sent, whatever happens while something is on its way."""

from penstock.internal.v1 import scheduler_pb2
from penstock.scheduler.outbox import Outbox


async def test_what_is_added_before_the_end_is_sent_though_a_message_is_on_its_way():
    outbox = Outbox(scheduler_pb2.PlaceResponse)
    outbox.response.granted.add(request_id=1)
    outbox.flush()
    sent = []
    async for response in outbox:
        sent += [lease.request_id for lease in response.granted]
        if len(sent) == 1:  # amid the first
            outbox.response.granted.add(request_id=2)
            outbox.flush()
            outbox.close()
    assert sent == [1, 2]
