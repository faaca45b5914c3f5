"""`moehive node drain`, `readmit` and `revoke` as a person uses them while no coordinator runs."""

from pathlib import Path

import pytest

from moehive.coordinator.cli import cluster
from moehive.coordinator.cluster.drains import accept_drain, drains, refuse_drain
from moehive.coordinator.cluster.records import admit_node, revoked_nodes
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.types import CoordinatorError, NodeName

ATTIC = NodeName("attic")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The state directory of a cluster that the node `attic` has joined."""
    (tmp_path / "ca").mkdir()
    store = Store(tmp_path / "coordinator.sqlite")
    with store.transaction() as db:
        admit_node(db, ATTIC, 2e9, 1e9)
    store.close()
    return tmp_path


def test_a_request_waits_for_a_coordinator_and_can_be_withdrawn(
    state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.0)
    for _ in range(2):  # asking again does no harm
        cluster.drain(ATTIC, state)
        assert "node attic is drained once one serves" in capsys.readouterr().out
    cluster.readmit(ATTIC, state)
    with pytest.raises(CoordinatorError, match="No node named 'attic' is quarantined or drained"):
        cluster.readmit(ATTIC, state)
    with pytest.raises(CoordinatorError, match="No node named 'cellar' has joined"):
        cluster.drain("cellar", state)


def test_the_answer_is_told(state: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(state / "coordinator.sqlite")
    monkeypatch.setattr(cluster, "sleep", lambda _: refuse_drain(store, ATTIC, "The others have no room."))
    with pytest.raises(CoordinatorError, match="The others have no room"):
        cluster.drain(ATTIC, state)
    monkeypatch.setattr(cluster, "sleep", lambda _: accept_drain(store, ATTIC))
    cluster.drain(ATTIC, state)
    assert "The others load what node attic holds" in capsys.readouterr().out
    assert drains(store)[ATTIC].accepted
    cluster.drain(ATTIC, state)  # it is drained already
    store.close()


def test_a_lost_machine_is_shut_out(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.revoke(ATTIC, state)
    assert "attic is shut out until it joins again" in capsys.readouterr().out
    store = Store(state / "coordinator.sqlite")
    assert revoked_nodes(store) == {ATTIC}
    store.close()
    with pytest.raises(CoordinatorError, match="No node named 'cellar' has joined"):
        cluster.revoke("cellar", state)
