"""What an estimate says has room is what the running cluster makes a plan for; a GPU is room above a disk alone."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.cluster.policy import usable
from moehive.coordinator.cluster.state import Capacity, ClusterState, Node
from moehive.coordinator.estimate.cluster import Cluster, Machine, Tier
from moehive.coordinator.estimate.constants import CONTEXT_TOKENS, COORDINATOR_BYTES, NODE_BYTES, VRAM_BYTES_PER_S
from moehive.coordinator.estimate.estimate import estimate
from moehive.coordinator.estimate.geometries import MODELS
from moehive.coordinator.estimate.holding import hold
from moehive.coordinator.estimate.model import Model, of_shape
from moehive.coordinator.estimate.step import decode_step
from moehive.coordinator.placement.place import USUAL_GPU_BANDWIDTH, place
from moehive.coordinator.types import CoordinatorError, NodeName
from moehive.kernels.geometry import bytes_filled

GB = 10**9
MODEL: Model = of_shape("qwen3-30b", MODELS["qwen3-30b"], "q4_k", layers=6)  # 2 GB of experts
ON_CPU = MODEL.in_format("iq4_nl")  # as many, which a GPU does not compute
BESIDE = MODEL.trunk_bytes + CONTEXT_TOKENS * MODEL.kv_bytes_a_token + COORDINATOR_BYTES


def capacities(cluster: Cluster) -> dict[str, Capacity]:
    """What the machines' nodes say when they join, and the coordinator's own memory."""
    found = {}
    for machine in cluster.machines:
        sizes = {name: tier.nbytes for name, tier in machine.tiers().items()}
        ram = max(0, sizes.get("ram", 0) - (BESIDE if machine.coordinator else NODE_BYTES))
        found[machine.name] = Capacity("h:1", ram, disk_bytes=sizes.get("disk", 0), vram_bytes=sizes.get("vram", 0))
    return found


def counted(cluster: Cluster, model: Model = MODEL) -> dict[str, int]:
    """The bytes that a plan may count on, by machine."""
    nodes = {NodeName(n): Node(NodeName(n), c, present=True) for n, c in capacities(cluster).items()}
    return {str(name): nbytes for name, nbytes in usable(ClusterState(nodes=nodes), model.layers).items()}


def is_planned(cluster: Cluster, model: Model = MODEL) -> bool:
    """Whether the coordinator finds a place for all experts."""
    try:
        place({NodeName(n): size for n, size in counted(cluster, model).items()}, {}, model.layers, None, 1)
    except CoordinatorError:
        return False
    return True


def tier(least: float, most: float, speed: float) -> st.SearchStrategy[Tier | None]:
    return st.none() | st.builds(Tier, st.integers(int(least * GB), int(most * GB)), st.just(speed))


machines = st.builds(Machine, st.just("m"), vram=tier(0.1, 4, 9e11), ram=tier(0.1, 2, 5e10), disk=tier(0.1, 3, 3e9))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, GB),
    tier(0.1, 4, 9e11),
    st.lists(machines, min_size=1, max_size=4),
    st.sampled_from([MODEL, ON_CPU]),
)
def test_it_fits_where_the_cluster_makes_a_plan(
    own: int, gpu: Tier | None, others: list[Machine], model: Model
) -> None:
    first = Machine("m0", coordinator=True, vram=gpu, ram=Tier(BESIDE + own, 5e10))
    named = (replace(machine, name=f"m{number}") for number, machine in enumerate(others, 1))
    cluster = Cluster(3e-4, 1.25e8, (first, *named))
    assert hold(model, cluster).fits == is_planned(cluster, model)


def test_above_a_disk_a_gpu_is_room_before_other_disks_are() -> None:
    """As much as it, and the disk, have; of a model that it does not compute nothing."""
    first = Machine("m0", coordinator=True, ram=Tier(BESIDE, 5e10))
    plain = Machine("plain", ram=Tier(NODE_BYTES + GB // 2, 5e10), disk=Tier(50 * GB, 2e9))
    ram = Tier(NODE_BYTES + GB // 4, 5e10)
    for vram, disk, room in ((4, 50, 4), (4, 2, 2), (2, 4, 2)):
        gpu = Machine("gpu", ram=ram, vram=Tier(vram * GB, 9e11), disk=Tier(disk * GB, 2e9))
        cluster = Cluster(3e-4, 1.25e8, (first, plain, gpu))
        assert counted(cluster)["plain"] == GB // 2
        assert counted(cluster)["gpu"] == GB // 4 + bytes_filled(room * GB, MODEL.layers)
        placed = hold(MODEL, cluster)
        assert placed.fits and not placed.read_bytes
        held = {holding.machine.name: holding for holding in placed.holdings}
        assert (
            held["plain"].disk_bytes == 0 < held["gpu"].disk_bytes == held["gpu"].expert_bytes - held["gpu"].ram_bytes
        )
        found = estimate({"q4_k": MODEL}, cluster)
        assert found.fits and not found.warnings and not found.formats[0].read_bytes

        assert counted(cluster, ON_CPU)["plain"] > GB // 2 > counted(cluster, ON_CPU)["gpu"] - GB // 4
        slow = estimate({"iq4_nl": ON_CPU}, cluster)
        assert slow.placed.read_bytes == sum(holding.disk_bytes for holding in slow.placed.holdings) > 0
        assert any("Experts in iq4_nl are not computed by a GPU, so that of gpu" in words for words in slow.warnings)
    # What is more than all memories is read from the disks, by each as much as its memory is.
    larger = of_shape("qwen3-30b", MODELS["qwen3-30b"], "q4_k", layers=12)
    shares = counted(cluster, larger)
    assert shares["gpu"] / shares["plain"] == pytest.approx(2.25 / 0.5, rel=0.01)


def test_a_gpus_speed_is_assumed_alike() -> None:
    assert USUAL_GPU_BANDWIDTH == VRAM_BYTES_PER_S


def test_without_a_disk_a_gpu_makes_no_room_and_reads_for_it() -> None:
    small = Machine("one", coordinator=True, ram=Tier(BESIDE + GB, 5e10))
    alone = Cluster(3e-4, 1.25e8, (small,))
    with_gpu = replace(alone, machines=(replace(small, vram=Tier(24 * GB, 9e11)),))
    assert not hold(MODEL, alone).fits and not hold(MODEL, with_gpu).fits and not is_planned(with_gpu)
    found = estimate({"q4_k": MODEL}, with_gpu)
    assert not found.fits and any("It does not fit" in sentence for sentence in found.warnings)
    assert any("The GPU of one is no room without a disk" in sentence for sentence in found.warnings)
    assert not any(one.fits and "GPU" in one.what for one in estimate({"q4_k": MODEL}, alone).advice)

    disk = replace(small, disk=Tier(50 * GB, 2e9))
    steps = []
    for vram in (None, Tier(GB // 2, 9e11), Tier(24 * GB, 9e11)):
        cluster = replace(alone, machines=(replace(disk, vram=vram),))
        placed = hold(MODEL, cluster)
        assert placed.fits and is_planned(cluster)
        assert placed.holdings[0].disk_bytes == pytest.approx(MODEL.expert_bytes - GB, rel=0.01)
        steps.append((placed.read_bytes, decode_step(MODEL, cluster, placed).seconds))
    assert steps == sorted(steps, reverse=True)  # the larger the GPU, the less is read from the disk
    assert steps[1][0] == steps[0][0] - GB // 2 and steps[2][0] == 0
