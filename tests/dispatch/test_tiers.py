"""What the dispatcher remembers of nodes with slow tiers."""

from moehive.coordinator.dispatch.tiers import TierView
from moehive.coordinator.models.base import tiers_of
from moehive.coordinator.types import NodeName
from moehive.proto import experts_pb2 as pb
from moehive.proto.tiers import read_likely, write_on_disk

A, B = NodeName("a"), NodeName("b")


class Backend:
    def __init__(self, tiers):
        self.tiers = tiers


def reply(*on_disk):
    made = pb.ComputeReply()
    write_on_disk(made, on_disk)
    return made


def test_what_is_on_disk_is_as_last_heard():
    view = TierView([4, 4], 0.0)
    assert tiers_of(Backend(view)) is None  # nobody has said so
    view.note(A, 0, pb.ComputeReply())
    assert not view.slow and view.on_disk(0) is None
    view.note(A, 0, reply(1, 2))
    view.note(B, 0, reply(3))
    assert tiers_of(Backend(view)) is view
    assert view.on_disk(0).tolist() == [False, True, True, True] and view.on_disk(1) is None
    view.note(A, 0, reply(2))
    assert view.on_disk(0).tolist() == [False, False, True, True]
    view.forget(B)
    assert view.on_disk(0).tolist() == [False, False, True, False]
    view.note(A, 1, pb.ComputeReply())  # all of it is in memory now
    assert not view.slow and view.on_disk(0) is None
    assert tiers_of(object()) is None


def test_a_hint_goes_with_one_layers_messages():
    view = TierView([4, 4], 0.0)
    view.expect([[3, 1], [0]])
    first, second, later = pb.ComputeRequest(), pb.ComputeRequest(), pb.ComputeRequest()
    view.tell(first)
    view.tell(second)
    view.sent()
    view.tell(later)
    assert read_likely(first) == read_likely(second) == [[3, 1], [0]] and read_likely(later) == []
