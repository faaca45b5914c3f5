"""What a plan keeps in a node's fast tiers: the experts that are used most, in a part of the tier."""

import numpy as np

from moehive.coordinator.placement.pins import covered, pinned
from moehive.coordinator.placement.place import Measured, better, place
from moehive.coordinator.placement.traces import Trace
from moehive.kernels.geometry import ExpertSpec, LayerGeometry

SPEC = ExpertSpec(hidden_size=64, intermediate_size=32, activation="silu", format="bf16")
LAYERS = [LayerGeometry(8, 2, SPEC)] * 2


def trace(*layers, tokens=100):
    """Each layer is {expert: how often of 100 tokens it is one of the two}."""
    experts = [
        np.repeat(np.array(list(uses), np.uint16), list(uses.values())).reshape(2, tokens).T for uses in layers
    ]
    return Trace(np.stack(experts), np.arange(tokens, dtype=np.uint32))


TRACE = trace({3: 90, 5: 60, 0: 40, 7: 10}, {1: 100, 6: 70, 2: 30})


def test_the_experts_that_are_used_most():
    owners = ((("a",),) * 8,) * 2
    pins = pinned(owners, {"a": (8 * SPEC.nbytes, 0)}, LAYERS, TRACE)
    assert pins["a"].in_ram == ((3, 5), (1, 6))  # half of the RAM
    assert pins["a"].in_vram == ((), ())
    assert covered(pins, owners, TRACE) == 320 / 400
    both = pinned(owners, {"a": (8 * SPEC.nbytes, 4 * SPEC.nbytes)}, LAYERS, TRACE)["a"]
    assert both.in_vram == ((3,), (1,)) and both.in_ram == ((0, 5), (2, 6))


def test_no_pins_where_all_fits_and_where_nothing_is_known():
    owners = ((("a",),) * 8,) * 2
    assert pinned(owners, {"a": (16 * SPEC.nbytes, 0)}, LAYERS, TRACE) == {}
    assert pinned(owners, {}, LAYERS, TRACE) == {}
    assert pinned(owners, {"a": (SPEC.nbytes, 0)}, LAYERS, TRACE) == {}  # half of it holds none


def test_an_expert_with_two_holders_is_asked_of_each_half_as_often():
    owners = ((("a",), ("a",), ("a",), ("a", "b"), ("a",), ("a",), ("a",), ("a",)), (("b",),) * 8)
    pins = pinned(owners, {"a": (2 * SPEC.nbytes, 0), "b": (20 * SPEC.nbytes, 0)}, LAYERS, TRACE)
    assert pins == {"a": (((5,), ()), ((), ()))}  # 60 are more than half of 90


def test_plans_have_them_once_there_is_traffic():
    capacities = {"a": 9 * SPEC.nbytes, "b": 9 * SPEC.nbytes}  # with disk
    measured = {name: Measured(10e9, 1e-4, ram_bytes=4 * SPEC.nbytes) for name in capacities}
    assert place(capacities, measured, LAYERS, None, 1).pins == {}
    pins = place(capacities, measured, LAYERS, TRACE, 1).pins
    assert pins.keys() == {"a", "b"} and all(sum(map(len, of.in_ram)) == 2 for of in pins.values())
    # A plan that was made before there was traffic is made anew, with the same owners.
    shares = place(capacities, {}, LAYERS, None, 1)
    again = better(capacities, measured, LAYERS, TRACE, 2, shares, steps_per_s=1.0)
    assert again is not None and again.owners == shares.owners and again.pins
    assert better(capacities, measured, LAYERS, TRACE, 3, again, steps_per_s=1.0) is None
