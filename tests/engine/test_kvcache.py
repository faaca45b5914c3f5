"""The account of KV bytes under random use."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.engine.kvcache import KVBudget, readable
from moehive.coordinator.types import NoRoom

OWNERS = st.sampled_from("abcd")


@given(st.lists(st.tuples(OWNERS, st.one_of(st.none(), st.integers(0, 120)))))
def test_never_above_its_bound(actions: list[tuple[str, int | None]]) -> None:
    budget = KVBudget(100)
    model: dict[str, int] = {}
    for owner, nbytes in actions:
        if nbytes is None:
            if owner in model:
                budget.release(owner)
                del model[owner]
        else:
            fits = sum(model.values()) - model.get(owner, 0) + nbytes <= 100
            assert budget.reserve(owner, nbytes) == fits
            if fits:
                model[owner] = nbytes
        budget.check_integrity()
        assert budget.used_bytes == sum(model.values()) and budget.owners == len(model)


def test_fits_alone() -> None:
    budget = KVBudget(2000)
    budget.reserve("a", 2000)
    budget.check_fits_alone(2000)
    with pytest.raises(NoRoom, match=r"2.0 kB of KV cache and the coordinator's bound is 2.0 kB"):
        budget.check_fits_alone(2001)
    with pytest.raises(ValueError, match="above 0"):
        KVBudget(0)


def test_readable() -> None:
    assert [readable(n) for n in (0, 999, 1500, 2 * 10**9, 5 * 10**12)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.0 GB",
        "5.0 TB",
    ]
