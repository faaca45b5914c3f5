"""What a node takes of a directive: bounded numbers, and no expert in a tier that is not in the slice."""

import pytest

from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import BoundsError, check_directive


def directive(**layer: object) -> pb.Directive:
    part = pb.LayerSlice(**layer)  # type: ignore[arg-type]
    return pb.Directive(assign=pb.AssignSlice(epoch=1, manifest=b"m", layers=[part]))


def test_a_slice_with_experts_in_its_tiers() -> None:
    check_directive(directive(layer=3, experts=[0, 2, 5, 9], in_ram=[2, 9], in_vram=[0, 2]))


@pytest.mark.parametrize(
    "layer",
    [
        {"experts": [1, 2], "in_ram": [3]},
        {"experts": [1, 2], "in_vram": [0]},
        {"experts": [], "in_ram": [1]},
        {"experts": [1, 2], "in_ram": [2, 1]},
        {"experts": [1, 2], "in_vram": [1, 1]},
        {"experts": [2, 1]},
        {"experts": [1 << 16]},
        {"layer": 1 << 10, "experts": [1]},
    ],
)
def test_what_a_slice_may_not_say(layer: dict[str, object]) -> None:
    with pytest.raises(BoundsError):
        check_directive(directive(**layer))
