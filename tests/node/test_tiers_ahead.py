"""What is read ahead of its layer: whose guesses, in which order, and how much."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.expert_node.tiers.arena import padded
from moehive.expert_node.tiers.prefetch import AHEAD_SHARE
from moehive.expert_node.tiers.ram import RamTier
from moehive.expert_node.tiers.reader import DiskReader
from moehive.expert_node.tiers.use import LAGS, PLACES, Chances, Transitions, place_of
from moehive.kernels.geometry import ExpertId, ExpertSpec

LAYERS, EXPERTS = 4, 12
SPEC = ExpertSpec(hidden_size=32, intermediate_size=32, activation="silu", format="q8_0")
SIZE = padded(SPEC.nbytes)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Makes tiers with room for so many of LAYERS * EXPERTS experts."""
    folder = tmp_path_factory.mktemp("experts")
    readers = []

    def tier(room):
        readers.append(DiskReader())
        made = RamTier(room * SIZE, [EXPERTS] * LAYERS, readers[-1])
        for layer in range(LAYERS):
            for number in range(EXPERTS):
                path = folder / f"{layer}-{number}.expert"
                path.write_bytes(bytes(SPEC.nbytes))
                made.add(ExpertId(layer, number), SPEC, path)
        return made

    yield tier
    for reader in readers:
        reader.close()


def ask(tier, layer, experts):
    """One request, from its lease to its end."""
    lease = tier.lease(layer, experts)
    for _ in lease:
        pass
    lease.close()


def test_two_layers_are_read_ahead(make):
    tier = make(40)
    lease = tier.lease(0, [0])
    tier.prefetch(0, [[1, 2, 3], [4, 5]], chosen=2)
    lease.close()
    tier.settle()
    assert tier.resident(1) == {1, 2, 3} and tier.resident(2) == {4, 5}
    ask(tier, 1, [1, 2])
    assert (tier.totals.here, tier.totals.foreseen, tier.totals.unused) == (2, 2, 1)  # 3 was not asked for
    ask(tier, 2, [4, 6])
    assert (tier.totals.here, tier.totals.foreseen, tier.totals.unused) == (3, 3, 2)


def test_a_newer_guess_takes_the_place_of_an_older_one(make):
    tier = make(40)
    ask(tier, 0, [0])
    tier.prefetch(0, [[], [4, 5]], chosen=2)
    tier.settle()
    ask(tier, 1, [0])
    tier.prefetch(1, [[5, 6]], chosen=2)
    tier.settle()
    ask(tier, 2, [4, 5, 6])  # the first guess was not in vain
    assert tier.totals.foreseen == tier.totals.prefetches == 3 and tier.totals.unused == 0


def test_what_is_certain_is_read_first_and_what_rarely_comes_true_is_not(make, monkeypatch):
    tier, due = make(40), {}
    read = tier.reader.read
    monkeypatch.setattr(tier.reader, "read", lambda job, when: (due.update({job.path.stem: when}), read(job, when)))
    ask(tier, 0, [0])
    tier.prefetch(0, [[1, 2], [3, 4]], chosen=1)  # the first of each is believed in more than what is nearly chosen
    tier.settle()
    assert sorted(due, key=due.get) == ["0-0", "1-1", "2-3", "1-2", "2-4"]
    chances = tier._prefetcher._chances
    for _ in range(300):
        chances.note({(True, 1): [(1, place_of(0, 1))]}, [])
    ask(tier, 1, [0])
    tier.prefetch(1, [[5, 6]], chosen=1)
    tier.settle()
    assert 5 not in tier.resident(2) and 6 in tier.resident(2)


def test_what_is_elsewhere_is_not_read_and_keeps_its_place(make):
    tier = make(40)
    ask(tier, 0, [0])
    tier.prefetch(0, [[1, 2, 3], [1]], 2, lambda layer: {1} if layer == 1 else ())
    tier.settle()
    assert tier.resident(1) == {2, 3} and tier.resident(2) == {1}
    assert tier._prefetcher._ahead[1].guesses[True, 1] == [(2, place_of(1, 2)), (3, place_of(2, 2))]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(4, 30))
def test_guesses_hold_a_share_and_are_counted_once(make, seed, room):
    tier, rng = make(room), np.random.default_rng(seed)
    for step in range(24):
        layer = step % LAYERS if rng.random() < 0.9 else int(rng.integers(LAYERS))
        ask(tier, layer, rng.choice(EXPERTS, 3, replace=False).tolist())
        likely = rng.integers(0, 2 * EXPERTS, (int(rng.integers(0, 3)), 6)).tolist()  # some are no experts, or twice
        tier.prefetch(layer, likely, chosen=3)
        assert tier._prefetcher.nbytes <= room * SIZE // AHEAD_SHARE
        assert tier.ram_bytes <= room * SIZE
        totals = tier.totals
        assert totals.foreseen <= totals.here <= totals.lookups
        assert 0 <= totals.foreseen + totals.late + totals.unused <= totals.prefetches
    tier.settle()


def test_transitions_learn_what_follows():
    transitions = Transitions([8, 8])
    for step in range(50):
        transitions.note(0, [step % 2])
        transitions.note(1, [4 + step % 2, 7])
    transitions.note(0, [0])
    assert transitions.likely(0, 1, at_least=0.5) == [7, 4]
    transitions.note(1, [4, 7])
    assert transitions.likely(1, 2, at_least=0.9) == [7]


def test_the_layer_before_the_last_counts_too():
    transitions = Transitions([8, 8, 8])
    for step in range(60):  # layer 1 says nothing, layer 0 says all
        transitions.note(0, [step % 2])
        transitions.note(1, [3])
        transitions.note(2, [5 + step % 2])
    transitions.note(0, [1])
    assert transitions.likely(0, 2) == [6]
    transitions.note(1, [3])
    assert transitions.likely(1, 1, at_least=0.6) == [6]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 4), max_size=5)), max_size=30))
def test_what_is_likely_is_an_expert_of_its_layer(requests):
    sizes = [5, 6, 7]
    transitions = Transitions(sizes)
    for layer, experts in requests:
        transitions.note(layer, experts)
        for distance in range(1, LAGS + 1):
            everything = transitions.likely(layer, distance, at_least=0.0)
            assert sorted(everything) in ([], list(range(sizes[(layer + distance) % 3])))
            some = transitions.likely(layer, distance)
            assert some == everything[: len(some)]


def test_chances_follow_what_comes_true():
    chances, source = Chances(), (True, 1)
    before = chances.of(source)
    for _ in range(300):
        chances.note({source: [(7, 0), (8, PLACES)]}, [8])
    after = chances.of(source)
    assert after[0] < 0.1 < before[0] and after[PLACES] > 0.9 > before[PLACES]
    assert after[1] == before[1] and chances.of((True, 2)) == before


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), unique=True, max_size=6), st.sets(st.integers(0, 9))), max_size=50
    ),
    st.integers(1, 20),
)
def test_chances_are_shares(history, chosen):
    chances, source = Chances(), (False, 2)
    for guess, asked in history:
        chances.of(source)
        chances.note({source: [(number, place_of(rank, chosen)) for rank, number in enumerate(guess)]}, asked)
    assert all(0 <= chance <= 1 for chance in chances.of(source)) and len(chances.of(source)) == 2 * PLACES
