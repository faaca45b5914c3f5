"""cluster.toml: what is written is read again, and what is wrong is said in one sentence."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.estimate.cluster import (
    Cluster,
    Machine,
    Tier,
    parse_cluster,
    read_cluster,
    to_toml,
    write_cluster,
)
from moehive.coordinator.estimate.constants import (
    COORDINATOR_BYTES,
    DISK_BYTES_PER_S,
    NODE_BYTES,
    PROBE_S,
    VRAM_BYTES_PER_S,
)
from moehive.coordinator.estimate.from_status import of_status
from moehive.coordinator.estimate.this_machine import disk_of
from moehive.coordinator.types import CoordinatorError

GOOD = """
[link]
rtt_s = 0.0003
bandwidth_Bps = 125000000

[[nodes]]
name = "desktop"
coordinator = true
vram_bytes = 24000000000
vram_Bps = 9e11
ram_bytes = 32000000000
ram_Bps = 4.5e10

[[nodes]]
name = "mini"
ram_bytes = 16000000000
ram_Bps = 6e10
disk_bytes = 1000000000000
disk_Bps = 3e9
"""


def test_the_file_of_the_documents_is_read() -> None:
    cluster = parse_cluster(GOOD)
    assert (cluster.rtt_s, cluster.bandwidth) == (0.0003, 1.25e8)
    desktop, mini = cluster.machines
    assert cluster.coordinator is desktop and not mini.coordinator
    assert desktop.vram == Tier(24 * 10**9, 9e11) and desktop.disk is None
    assert mini.vram is None and mini.disk == Tier(10**12, 3e9)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("coordinator = true", "", "coordinator = true on one node"),
        ('name = "mini"', 'name = "mini"\ncoordinator = true', "on one alone"),
        ('name = "mini"', 'name = "desktop"', "two nodes alike"),
        ("ram_Bps = 6e10", "", "both ram_bytes and ram_Bps"),
        ("ram_Bps = 6e10", "ram_Bps = -1", "must be a number of at least 1e-06"),
        ("ram_Bps = 6e10", "ram_Bps = nan", "must be a number of at least 1e-06"),
        ("ram_Bps = 6e10", "ram_Bps = 1e-300", "must be a number of at least 1e-06"),
        ("rtt_s = 0.0003", "rtt_s = -1", "must be a number of at least 0"),
        ("ram_Bps = 6e10", "ram_Bps = 6e10\ncores = 4", "unknown key 'cores'"),
        ("ram_Bps = 6e10", "ram_Bps = 6e10\nstep_factor = 0", "step_factor of"),
        ("ram_Bps = 6e10", "ram_Bps = 6e10\nproducts_per_s = 0", "products_per_s of mini in cluster.toml must be"),
        ("ram_Bps = 6e10", "ram_Bps = 6e10\nproducts_per_s = true", "products_per_s of"),
        ("ram_Bps = 6e10", "ram_Bps = 6e10\ntoken_products_per_s = -1", "token_products_per_s of mini in"),
        ("rtt_s = 0.0003", "", "rtt_s of"),
        ("[link]", "[lnk]", "unknown key 'lnk'"),
        ("[link]", "[link", "not valid TOML"),
        ("ram_bytes = 32000000000\nram_Bps = 4.5e10", "", "gives the coordinator no ram_bytes"),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, sentence: str) -> None:
    assert old in GOOD
    with pytest.raises(CoordinatorError, match=sentence):
        parse_cluster(GOOD.replace(old, new))


tiers = st.none() | st.builds(Tier, st.integers(1, 2**50), st.floats(1, 1e15))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_written_is_read_again(data: st.DataObject) -> None:
    found = data.draw(st.lists(names, min_size=1, max_size=5, unique=True))
    machines = [
        Machine(
            name,
            number == 0,
            data.draw(tiers),
            Tier(data.draw(st.integers(1, 2**50)), 1e9) if number == 0 else data.draw(tiers),
            data.draw(tiers),
            step_factor=data.draw(st.just(1.0) | st.floats(0.01, 100)),
            products_per_s=data.draw(st.none() | st.floats(1, 1e18)),
            token_products_per_s=data.draw(st.none() | st.floats(1, 1e18)),
        )
        for number, name in enumerate(found)
    ]
    cluster = Cluster(data.draw(st.floats(0, 1)), data.draw(st.floats(1, 1e12)), tuple(machines))
    assert parse_cluster(to_toml(cluster)) == cluster


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300))
def test_any_text_gives_a_cluster_or_a_sentence(text: str) -> None:
    with pytest.raises(CoordinatorError) as caught:
        parse_cluster(text)
    assert str(caught.value)


def test_a_pipe_or_a_device_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cluster.toml")
    for path in (tmp_path / "cluster.toml", Path("/dev/zero")):
        with pytest.raises(CoordinatorError, match="is a pipe, a device or a socket"):
            read_cluster(path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    cluster = parse_cluster(GOOD)
    write_cluster(path, cluster)
    assert read_cluster(path) == cluster
    assert [file.name for file in tmp_path.iterdir()] == ["cluster.toml"]
    with pytest.raises(CoordinatorError, match="can't be written"):
        write_cluster(tmp_path / "nowhere" / "cluster.toml", cluster)
    with pytest.raises(CoordinatorError, match="can't be read"):
        read_cluster(tmp_path / "other.toml")


@dataclass(frozen=True)
class Node:
    """What a status says of one."""

    name: str
    address: str = "192.168.0.2:7801"
    ram_bytes: int = 16 * 10**9
    read_bandwidth: float = 2e10
    round_trip_s: float = 0.0
    link_bandwidth: float = 0.0
    disk_bytes: int = 0
    disk_bandwidth: float = 0.0
    vram_bytes: int = 0
    products_per_s: float = 0.0
    token_products_per_s: float = 0.0


def own(disk: Tier | None = None) -> Machine:
    return Machine("coordinator", coordinator=True, ram=Tier(8 * 10**9, 3e10), disk=disk, step_factor=0.5)


def test_a_status_becomes_a_file_with_the_slowest_link() -> None:
    quick = Node("a", round_trip_s=2e-3, link_bandwidth=1.1e8, products_per_s=2e11, token_products_per_s=1e11)
    nodes = [Node("coordinator"), quick, Node("b", round_trip_s=3e-3)]
    cluster, assumed = of_status(nodes, own())
    assert not assumed and cluster.bandwidth == 1.1e8
    assert cluster.rtt_s == pytest.approx(3e-3 - 0.5 * PROBE_S)
    assert [machine.name for machine in cluster.machines] == ["coordinator", "a", "b"]
    assert cluster.coordinator.ram == Tier(8 * 10**9, 3e10)
    assert parse_cluster(to_toml(cluster)) == cluster
    assert cluster.machines[1].ram == Tier(16 * 10**9 + NODE_BYTES, 2e10)  # an estimate leaves experts 16 GB of it
    assert [machine.products_per_s for machine in cluster.machines[1:]] == [2e11, None]
    assert [machine.token_products_per_s for machine in cluster.machines[1:]] == [1e11, None]
    assert cluster.machines[1].disk is None and cluster.machines[1].vram is None
    assert of_status([Node("a", round_trip_s=1e-4)], own())[1][0].startswith("No large message")
    with pytest.raises(CoordinatorError, match="send the model a request"):
        of_status([Node("a")], own())


def test_a_disk_and_a_gpu_are_in_the_file_and_what_is_assumed_of_them_is_said() -> None:
    link = {"round_trip_s": 1e-3, "link_bandwidth": 1e8}
    nodes = [
        Node("read", disk_bytes=10**12, disk_bandwidth=3e9, **link),
        Node("unread", disk_bytes=2 * 10**12, **link),
        Node("gpu", vram_bytes=24 * 10**9, **link),
    ]
    cluster, assumed = of_status(nodes, own())
    _, read, unread, gpu = cluster.machines
    assert (read.disk, unread.disk) == (Tier(10**12, 3e9), Tier(2 * 10**12, DISK_BYTES_PER_S))
    assert (gpu.vram, gpu.disk, read.vram) == (Tier(24 * 10**9, VRAM_BYTES_PER_S), None, None)
    assert len(assumed) == 2 and "disk of unread was not measured" in assumed[0] and "GPU of gpu" in assumed[1]
    assert parse_cluster(to_toml(cluster)) == cluster


@pytest.mark.parametrize(
    ("address", "left"),
    [("192.168.0.2:7801", 500), ("127.0.0.1:7801", 300), ("[::1]:7801", 300), ("a-name:7801", 500)],
)
def test_the_coordinators_disk_less_what_a_node_there_gives(address: str, left: int) -> None:
    node = Node("a", address, round_trip_s=1e-3, link_bandwidth=1e8, disk_bytes=200 * 10**9, disk_bandwidth=2e9)
    cluster, assumed = of_status([node], own(Tier(500 * 10**9, 3e9)))
    assert cluster.coordinator.disk == Tier(left * 10**9, 3e9)
    assert len(assumed) == 1 and f"could give {left} GB of disk" in assumed[0]
    assert parse_cluster(to_toml(cluster)) == cluster


def test_the_coordinators_memory_less_what_nodes_there_give() -> None:
    """All of them together have no more than the machine."""
    measured = {"round_trip_s": 1e-3, "link_bandwidth": 1e8}
    here = [Node(name, "127.0.0.1:7801", ram_bytes=3 * 10**9, **measured) for name in ("a", "b")]
    cluster, _ = of_status([*here, Node("far", **measured)], own())
    assert cluster.coordinator.ram == Tier(2 * 10**9, 3e10)
    full, _ = of_status([Node("a", "127.0.0.1:7801", ram_bytes=8 * 10**9, **measured)], own())
    assert full.coordinator.ram == Tier(COORDINATOR_BYTES, 3e10)


def test_what_a_node_takes_whole_is_not_the_coordinators() -> None:
    node = Node("a", "127.0.0.1:7801", round_trip_s=1e-3, link_bandwidth=1e8, disk_bytes=10**9, disk_bandwidth=2e9)
    cluster, assumed = of_status([node], own(Tier(10**9, 3e9)))
    assert cluster.coordinator.disk is None and not assumed


def test_a_disk_is_measured_and_nothing_is_left_on_it(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    disk = disk_of(folder)
    assert 0 < disk.nbytes < shutil.disk_usage(folder).total and disk.bytes_per_s > 0
    assert not list(folder.iterdir())


def test_a_full_disk_is_not_measured(small_disk: Path, fill: Callable[[Path, int], Path]) -> None:
    fill(small_disk, 1 << 20)
    with pytest.raises(OSError, match="No space left"):
        disk_of(small_disk)
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]
