"""What `moehive status` says of its nodes."""

from types import SimpleNamespace

from moehive.coordinator.cli.loading import load_sentences
from moehive.coordinator.cli.status_words import in_words


def node(**figures):
    """What the sentences read of a node."""
    usual = {
        "name": "near", "state": "ready", "experts_held": 60, "ram_bytes": 3 << 30, "read_bandwidth": 30e9,
        "expert_calls": 6000, "compute_ns": 60_000_000, "round_trip_s": 1e-5,
        "load_bytes": 0, "load_total_bytes": 0, "load_bytes_per_s": 0.0, "source_fault": "",
        "problem": "",
    }  # fmt: skip
    return SimpleNamespace(**(usual | figures))


NEAR = node()
SLOW = node(name="slow", experts_held=20, ram_bytes=1 << 30, read_bandwidth=10e9, compute_ns=180_000_000)


def test_it_says_why_and_who_is_waited_for():
    words = in_words([NEAR, SLOW])
    assert words[0].startswith("near holds 75% of what is held: it gives 75% of the memory and reads 30.0 GB/s")
    assert "50% of the calls went there, at 10 µs each" in words[0]
    assert words[2] == "A layer waits most for slow: 75% of the nodes' computing was its."
    assert "like slow would take over up to 20%" in words[3]


def test_a_far_node_is_named_for_its_way():
    assert "the way to far: 5.00 ms" in " ".join(in_words([NEAR, node(name="far", round_trip_s=5e-3)]))


def test_it_is_silent_about_what_is_not_known():
    fresh = {"expert_calls": 0, "compute_ns": 0, "read_bandwidth": 0.0, "round_trip_s": 0.0}
    assert in_words([node(**fresh)]) == ["near holds 100% of what is held: it gives 100% of the memory."]
    assert in_words([node(**fresh, experts_held=0)]) == []


def test_a_node_that_is_away_holds_nothing_for_now():
    assert in_words([NEAR, node(name="gone", state="away")])[0].startswith("near holds 100% of what is held")


def test_it_says_what_is_wrong_with_a_node_though_the_others_serve():
    full = node(name="full", state="joining", experts_held=0, problem="The disk of /srv is full: free some space.")
    liar = node(name="liar", state="quarantined", experts_held=0, problem="It answered NaN.")
    words = in_words([NEAR, full, liar])
    assert words[0] == "full could not load its slice, and tries again: The disk of /srv is full: free some space."
    assert words[1].startswith("liar is quarantined: It answered NaN.") and "`moehive node readmit liar`" in words[1]


def test_it_says_who_was_drained_and_how_that_ends():
    idle = node(name="idle", state="drained", experts_held=0)
    words = in_words([NEAR, node(name="leaver", state="draining"), idle])
    assert words[0] == "leaver is being drained: the others load its experts."
    assert words[1] == "idle is drained; `moehive node readmit idle` gives it experts again."


def test_it_says_what_is_loaded_and_how_long_that_takes():
    loading = {"state": "loading", "load_bytes": 3 * 10**9, "load_total_bytes": 9 * 10**9}
    serving = node(name="near", **loading | {"state": "ready"}, load_bytes_per_s=600e6)
    nodes = [serving, node(name="new", **loading, load_bytes_per_s=200e6), node(name="slow", **loading), node()]
    assert list(load_sentences(nodes)) == [
        "near has loaded 3.0 GB of 9.0 GB, 600 MB/s, 10 s left.",
        "new has loaded 3.0 GB of 9.0 GB, 200 MB/s, 30 s left.",
        "slow has loaded 3.0 GB of 9.0 GB.",  # at which rate is not known yet
    ]


def test_it_names_who_gave_wrong_bytes():
    liar = node(name="liar", source_fault="gave near wrong bytes of expert 3 of layer 1")
    assert list(load_sentences([NEAR, liar])) == [
        "liar gave near wrong bytes of expert 3 of layer 1; they were fetched again from elsewhere."
    ]
