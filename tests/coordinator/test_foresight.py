"""Choosing again among experts in memory, against the router's own choice; and hints of what comes next."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.models.lean.foresight import likely, prefer_in_memory
from moehive.kernels.trunk_ops import RouterLayer, TrunkOps

EXPERTS, TOP_K = 16, 4


def router_of(scores, renormalize, **more):
    return RouterLayer(experts=EXPERTS, top_k=TOP_K, scores=scores, renormalize=renormalize, **more)


ROUTERS = {
    "softmax": router_of("softmax", False),
    "renormalized": router_of("softmax", True),
    "chosen": router_of("chosen_softmax", True),
    "sigmoid": router_of("sigmoid", True, bias=torch.linspace(-0.2, 0.2, EXPERTS), scaling=2.5),
    "groups": router_of("sigmoid", True, bias=torch.linspace(0, 0.1, EXPERTS), groups=4, top_groups=2, scaling=2.5),
}


def routed(router, logits):
    ids, weights = torch.empty(len(logits), TOP_K, dtype=torch.int64), torch.empty(len(logits), TOP_K)
    TrunkOps(1).route(router.structure(), logits, ids, weights)
    return ids, weights


def by_expert(ids, weights):
    return torch.zeros(len(ids), EXPERTS).scatter_(1, ids, weights)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_without_a_difference_the_choice_is_the_routers(name, margin):
    router, logits = ROUTERS[name], torch.randn(20, EXPERTS, generator=torch.Generator().manual_seed(1))
    ids, weights = routed(router, logits)
    again, new = ids.clone(), torch.zeros_like(weights)
    # No margin, or nothing on disk: every score grows alike.
    on_disk = np.arange(EXPERTS) % 2 == 0 if margin == 0.0 else np.zeros(EXPERTS, dtype=np.bool_)
    prefer_in_memory(router, logits, on_disk, margin, again, new)
    if router.bias is None or margin == 0.0:  # (score + bias) that is negative shrinks: another order
        torch.testing.assert_close(by_expert(again, new), by_expert(ids, weights), rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 1.0), st.sampled_from(["softmax", "renormalized", "chosen"]))
def test_only_what_is_within_the_margin_is_replaced(seed, margin, name):
    router, logits = ROUTERS[name], torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(seed))
    ids, weights = routed(router, logits)
    before = set(ids[0].tolist())
    on_disk = np.random.default_rng(seed).random(EXPERTS) < 0.5
    prefer_in_memory(router, logits, on_disk, margin, ids, weights)
    after = set(ids[0].tolist())
    scores = logits.softmax(1)[0]
    assert len(after) == TOP_K
    assert all(on_disk[gone] for gone in before - after)
    assert not any(on_disk[new] for new in after - before)
    for gone in before - after:
        assert all(scores[gone] <= (1 + margin) * scores[new] * 1.0001 for new in after - before)
    for kept in after & before:  # an expert on disk stays when nothing in memory is near
        if on_disk[kept]:
            left = [n for n in range(EXPERTS) if n not in after and not on_disk[n]]
            assert all(scores[kept] * 1.0001 >= (1 + margin) * scores[n] for n in left)


def test_groups_that_were_not_chosen_stay_out():
    router, logits = ROUTERS["groups"], torch.randn(30, EXPERTS, generator=torch.Generator().manual_seed(3))
    ids, weights = routed(router, logits)
    groups = [set((row // 4).tolist()) for row in ids]
    prefer_in_memory(router, logits, np.arange(EXPERTS) % 3 > 0, 5.0, ids, weights)
    assert all(set((row // 4).tolist()) <= before for row, before in zip(ids, groups, strict=True))


@pytest.mark.parametrize("name", ["softmax", "chosen", "sigmoid"])
def test_the_likely_experts_are_the_routers_choice(name):
    router, logits = ROUTERS[name], torch.randn(1, EXPERTS, generator=torch.Generator().manual_seed(5))
    ids, _ = routed(router, logits)
    guess = likely(router, logits)
    assert guess[:TOP_K] == ids[0].tolist()
    assert len(guess) == len(set(guess)) == TOP_K * 3 // 2
