"""The hop's two fields for slow tiers: what is written is read, and nothing else is believed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import WireError
from moehive.proto.tiers import MAX_AHEAD, MAX_LIKELY, read_likely, read_on_disk, write_likely, write_on_disk


@given(st.lists(st.lists(st.integers(0, 65_535), max_size=300), max_size=3))
def test_likely(layers):
    request = pb.ComputeRequest()
    write_likely(request, layers)
    assert read_likely(request) == [experts[:MAX_LIKELY] for experts in layers[:MAX_AHEAD]]


@given(st.sets(st.integers(0, 300)), st.integers(1, 400))
def test_on_disk(experts, count):
    reply = pb.ComputeReply()
    assert read_on_disk(reply, count) is None
    write_on_disk(reply, experts)
    mask = read_on_disk(reply, count)
    assert mask is not None and mask.shape == (count,)
    assert set(np.flatnonzero(mask).tolist()) == {number for number in experts if number < count}


@given(st.lists(st.binary(max_size=1200), max_size=4))
def test_hostile_hints(data):
    try:
        layers = read_likely(pb.ComputeRequest(likely=data))
    except WireError:
        return
    assert len(layers) <= MAX_AHEAD and all(len(experts) <= MAX_LIKELY for experts in layers)
    assert all(0 <= number <= 65_535 for experts in layers for number in experts)


def test_what_is_too_long():
    with pytest.raises(WireError):
        read_on_disk(pb.ComputeReply(on_disk=bytes(8193)), 8)
    with pytest.raises(WireError):
        read_likely(pb.ComputeRequest(likely=[bytes(4 * 257)]))
    with pytest.raises(WireError):
        read_likely(pb.ComputeRequest(likely=[b"", b"", b""]))
