"""Messages with payload in them: on the wire they are what protobuf writes and reads."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.executor.handoff.framing import Request, deserialize, serialize
from penstock.internal.v1 import handoff_pb2 as pb

PUSHES = st.builds(
    pb.Push,
    handoff_id=st.binary(max_size=16),
    epoch=st.integers(0, 2**64 - 1),
    first_token=st.integers(0, 2**32 - 1),
    tokens=st.integers(0, 2**32 - 1),
    form=st.sampled_from([pb.KV_FORM_UNSPECIFIED, pb.KV_FORM_CANONICAL, pb.KV_FORM_NATIVE]),
    dtype=st.text(max_size=200),
    checksum=st.integers(0, 2**64 - 1),
)
PAYLOADS = st.builds(
    lambda size, byte: bytes([byte]) * size, st.sampled_from([1, 127, 128, 4000, 4096, 16384, 70_000]), st.integers(0, 255)
)


def whole(push, payload):
    message = pb.HandoffRequest(push=push)
    message.push.inline = payload
    return message


@given(PUSHES, PAYLOADS)
def test_protobuf_reads_what_is_written(push, payload):
    request = Request(pb.HandoffRequest(push=push), memoryview(payload))
    assert pb.HandoffRequest.FromString(serialize(request)) == whole(push, payload)


@given(PUSHES, PAYLOADS)
def test_what_protobuf_writes_is_read_without_a_copy(push, payload):
    request = deserialize(whole(push, payload).SerializeToString())
    if len(payload) >= 4096:
        assert request.message == pb.HandoffRequest(push=push)
        assert isinstance(request.inline, memoryview)
        assert request.inline == payload
    else:
        assert (request.message if request.inline is None else whole(request.message.push, bytes(request.inline))) == whole(
            push, payload
        )


@given(PUSHES, PAYLOADS, st.sampled_from(["message", "push"]))
def test_another_order_of_fields_means_the_same(push, payload, where):
    late = pb.HandoffRequest(push=pb.Push(dtype="late"))
    written = serialize(Request(pb.HandoffRequest(push=push), payload))
    if where == "message":  # a second Push, which is merged into the first
        data = written + late.SerializeToString()
    else:  # a field of the Push behind the payload
        inner = whole(push, payload).push.SerializeToString() + late.push.SerializeToString()
        data = pb.HandoffRequest(push=pb.Push.FromString(inner)).SerializeToString()
    request = deserialize(data)
    read = request.message if request.inline is None else whole(request.message.push, bytes(request.inline))
    assert read == pb.HandoffRequest.FromString(data)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=40).map(lambda head: b"\x22" + head + bytes(5000))))
@example(b"\x22" + b"\xff" * 5000)
@example(b"\x22\x80\x28" + b"\x42\x00" + bytes(5118))
def test_bytes_that_are_no_message_are_refused_as_protobuf_does(data):
    try:
        expected = pb.HandoffRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            deserialize(data)
    else:
        request = deserialize(data)
        assert (request.message if request.inline is None else whole(request.message.push, bytes(request.inline))) == expected


@pytest.mark.parametrize("message", [pb.HandoffRequest(), pb.HandoffRequest(renew=pb.Renew(handoff_ids=[bytes(16)] * 1000))])
def test_messages_without_payload_are_left_to_protobuf(message):
    assert deserialize(serialize(Request(message))) == Request(message)
