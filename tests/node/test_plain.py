"""Requests of decoding answered by the native library: the same reply as otherwise, or none."""

import os

import pytest
import torch
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moehive.expert_node.chain import Onward
from moehive.expert_node.executor import Executor
from moehive.expert_node.plain import PlainRequests
from moehive.expert_node.service import Came, ExpertsService
from moehive.expert_node.store import ExpertStore
from moehive.kernels.geometry import ExpertId
from moehive.kernels.ops import ExpertOps, load_expert
from moehive.proto import experts_pb2 as pb
from moehive.proto.tensors import WireError, parse_request, read_request
from moehive.proto.wire.windows import Times

EXAMPLES = int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "200"))
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def held(model):
    """A node's store with all of the model's experts, its executor and service, and what answers plain requests."""
    store = ExpertStore(model.manifest.total_bytes)
    store.use(model.manifest, 1)
    for expert, blob in model.blobs.items():
        store.add(expert, load_expert(model.manifest.layers[expert.layer].spec, blob))
    executor = Executor(store, ExpertOps(1))
    service = ExpertsService(executor, Onward(lambda: pytest.fail("nobody is asked")))
    return store, service, PlainRequests(executor)


def as_usual(service, request):
    """The reply that the node gives when it parses the request itself."""
    whole = parse_request(request.SerializeToString())
    came = Came(whole.head, *read_request(whole), 1, 2, Times())
    return without_times(pb.ComputeReply.FromString(b"".join(service._answer(came, []))))


def reply_to(plain, raw):
    answer = plain.answer(raw, Times())
    return None if answer is None else without_times(pb.ComputeReply.FromString(answer))


def without_times(reply):
    assert reply.HasField("refusal") or (reply.compute_ns > 0 and reply.began_ns > 0)
    for name in ("compute_ns", "began_ns", "reading_ns", "waited_ns", "wrote_ns"):
        reply.ClearField(name)
    return reply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", [pb.REDUCTION_PARTIAL_SUM, pb.REDUCTION_PER_EXPERT])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_the_reply_is_the_same_to_the_bit(held, make_request, dtype, reduction, tokens):
    _, service, plain = held
    for seed in range(5):
        request = make_request(64, [0, 2, 5], tokens, layer=seed % 2, dtype=dtype, reduction=reduction, seed=seed)[0]
        request.id, request.epoch = 1 + seed * 1_000_003, 3
        assert reply_to(plain, request.SerializeToString()) == as_usual(service, request)
    assert plain.answer(bytearray(request.SerializeToString()), Times()) is not None


def test_what_is_not_plain_is_left_alone(held, make_request):
    store, _, plain = held

    def answered(change, tokens=1):
        request = make_request(64, [0, 1], tokens)[0]
        request.epoch = 1
        change(request)
        return plain.answer(request.SerializeToString(), Times()) is not None

    assert answered(lambda request: None)
    assert not answered(lambda request: setattr(request, "epoch", 0))  # of another model
    assert not answered(lambda request: setattr(request, "layer", 1023))
    assert not answered(lambda request: setattr(request, "hidden_size", 32))
    assert not answered(lambda request: request.likely.append(b"\0\0\0\0"))
    assert not answered(lambda request: setattr(request, "dtype", pb.DTYPE_INT8))
    assert not answered(lambda request: request.chain.add(node_name="b", address="b:1"))
    assert not answered(lambda request: None, tokens=40)  # a worker's
    # Experts that come and go are seen at once.
    layer = make_request(64, [0], 1)[0].layer
    store.retain([expert for expert in held_experts(store) if expert != ExpertId(layer, 1)])
    assert not answered(lambda request: None)


def held_experts(store):
    return [ExpertId(layer, number) for layer in range(len(store.manifest.layers)) for number in store.layer(layer)]


@fuzz
@given(data=st.data())
def test_damage_is_never_answered_otherwise(held, make_request, data):
    """A changed message gets the reply that its parsed form gets, or none."""
    _, service, plain = held
    raw = bytearray(make_request(64, [0, 2], data.draw(st.integers(1, 3)))[0].SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        # Where the fields' tags and lengths are: mostly at both ends.
        end = data.draw(st.sampled_from([60, len(raw)]))
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    got = reply_to(plain, bytes(raw))
    if got is None:
        return
    try:
        request = pb.ComputeRequest.FromString(bytes(raw))
        wanted = as_usual(service, request)
    except (DecodeError, WireError):
        pytest.fail("an unsound request was answered")
    assert got.SerializeToString() == wanted.SerializeToString()
