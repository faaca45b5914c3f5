"""Splitting a layer's routing by node: nothing lost, nothing twice, in a fixed order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.dispatch.routing import split
from moehive.proto import experts_pb2 as pb

cases = st.integers(1, 12).flatmap(
    lambda experts: st.tuples(
        st.lists(st.integers(0, 3), min_size=experts, max_size=experts),  # each expert's node
        st.integers(1, 4).flatmap(
            # experts and beyond: ids that mean "none"
            lambda k: st.lists(st.lists(st.integers(0, experts + 1), min_size=k, max_size=k), min_size=1, max_size=9)
        ),
    )
)


@given(cases)
def test_every_pair_goes_to_its_owner_once(case: tuple[list[int], list[list[int]]]) -> None:
    owners, rows = case
    owner, ids = np.array(owners), np.array(rows)
    weights = np.arange(ids.size, dtype=np.float32).reshape(ids.shape) + 1
    seen: set[tuple[int, int, float]] = set()
    shares = split(ids, weights, owner)
    assert list(shares) == sorted(shares)
    for node, share in shares.items():
        offsets, experts, given_weights = share.routing
        message = pb.ComputeRequest.FromString(share.message)
        assert message == pb.ComputeRequest(
            offsets=offsets.tobytes(), experts=experts.tobytes(), weights=given_weights.tobytes()
        )
        assert offsets[0] == 0 and offsets[-1] == len(experts) == len(given_weights) == len(share.pairs)
        assert len(share.tokens) > 0 and np.all(np.diff(share.tokens) > 0)
        for row, token in enumerate(share.tokens):
            begin, end = offsets[row], offsets[row + 1]
            assert begin < end  # no token without a pair
            for pair, expert, weight in zip(
                share.pairs[begin:end], experts[begin:end], given_weights[begin:end], strict=True
            ):
                assert pair // ids.shape[1] == token and owners[expert] == node
                seen.add((int(token), int(expert), float(weight)))
    wanted = {
        (t, int(ids[t, j]), float(weights[t, j]))
        for t in range(len(rows))
        for j in range(ids.shape[1])
        if ids[t, j] < len(owners)
    }
    assert seen == wanted


def test_no_valid_expert_needs_no_node() -> None:
    assert split(np.array([[5, 6]]), np.ones((1, 2), np.float32), np.array([0, 1])) == {}
