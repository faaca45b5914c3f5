"""The worked example of README.md and docs/models.md says what `moehive estimate` says."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moehive.coordinator.estimate import constants
from moehive.coordinator.estimate.cluster import Cluster, Tier, parse_cluster
from moehive.coordinator.estimate.estimate import Estimate, estimate, in_all_formats
from moehive.coordinator.estimate.geometries import find_shape
from moehive.coordinator.estimate.model import of_shape

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
NAME = "Qwen/Qwen3.5-397B-A17B"


def in_prose(sentence: str, document: str, *values: float) -> None:
    """That a document has this sentence, with these values, to as many digits as it prints, where this has #s."""
    pattern = re.escape(sentence).replace(r"\ ", r"\s+").replace(r"\#", r"(\d+(?:\.\d+)?)")
    found = re.search(pattern, document)
    assert found is not None, f"nowhere: {sentence}"
    assert len(found.groups()) == len(values)
    for printed, value in zip(found.groups(), values, strict=True):
        places = len(printed.partition(".")[2])
        assert printed == f"{value:.{places}f}", f"{sentence}: it is {value}"


@pytest.fixture(scope="module")
def file() -> str:
    """The cluster.toml that the document shows."""
    found = re.search(r"```toml\n(\[link\]\n.*?)```", MODELS, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def cluster(file: str) -> Cluster:
    return parse_cluster(file)


def of(cluster: Cluster, format: str | None = None) -> Estimate:
    found = find_shape(NAME)
    assert found is not None
    return estimate(in_all_formats(of_shape(NAME, found[1], "bf16")), cluster, format=format)


def with_ram(cluster: Cluster, more: dict[str, int]) -> Cluster:
    machines = []
    for machine in cluster.machines:
        assert machine.ram is not None
        nbytes = machine.ram.nbytes + more.get(machine.name, 0)
        machines.append(replace(machine, ram=Tier(nbytes, machine.ram.bytes_per_s)))
    return replace(cluster, machines=tuple(machines))


def test_what_the_command_prints_is_what_the_document_shows(file: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(file)
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "estimate", NAME, "--cluster", str(path)]
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    shown = re.search(rf"`moehive estimate {NAME} --cluster cluster.toml`.*?```text\n(.*?)```", MODELS, re.DOTALL)
    assert shown is not None
    # A table's blank lines are one in the document, without the spaces that fill a terminal's line.
    printed = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in done.stdout.splitlines()))
    assert shown[1].strip() == printed.strip()


def test_the_prose_has_its_figures(cluster: Cluster) -> None:
    found = of(cluster)
    sizes = {size.format: size for size in found.formats}
    coordinator = found.placed.holdings[0]
    processes = constants.COORDINATOR_BYTES + (len(cluster.machines) - 1) * constants.NODE_BYTES
    ram = [machine.ram.nbytes / 1e9 for machine in cluster.machines if machine.ram is not None]
    more = of(with_ram(cluster, {"desktop": 32 << 30}), "q2_k")
    assert more.placed.read_bytes == 0
    wifi = of(replace(cluster, rtt_s=0.004), "q2_k")
    assert any("Wi-Fi" in sentence for sentence in wifi.warnings)

    smallest = min(found.formats, key=lambda size: size.total_bytes)
    assert smallest.format == found.model.format == "q2_k"
    in_prose(
        "just short of the smallest format: # bits a weight, the program on each machine (# to # GB) and a cache of "
        "# tokens (# GB) come to # GB, and # GB of experts lie on desktop's disk. A token takes some # ms; loading "
        "over 1 Gbit/s takes # minutes, once. With 32 GB more RAM in desktop nothing is left on the disk: # tokens/s",
        MODELS,
        8 * found.model.total_bytes / found.model.weights,
        constants.NODE_BYTES / 1e9,
        constants.COORDINATOR_BYTES / 1e9,
        constants.CONTEXT_TOKENS,
        coordinator.kv_bytes / 1e9,
        (found.model.total_bytes + processes + coordinator.kv_bytes) / 1e9,
        found.placed.read_bytes / 1e9,
        found.step.seconds * 1e3,
        found.load_s / 60,
        more.decode_tokens_per_s,
    )
    in_prose(
        "In q4_k (`--format q4_k`), which loses less, # GB lie on the disk and each token waits for it: # tokens/s. "
        "The same machines over Wi-Fi with a round trip of # ms do # tokens/s in q2_k",
        MODELS,
        sizes["q4_k"].read_bytes / 1e9,
        of(cluster, "q4_k").decode_tokens_per_s,
        4,
        wifi.decode_tokens_per_s,
    )
    twice = of(with_ram(cluster, {machine.name: machine.ram.nbytes for machine in cluster.machines if machine.ram}))
    in_prose("with # GB the model fits in int4_g32 and in q4_k", MODELS, 2 * sum(ram))
    assert twice.model.format == "int4_g32" and not twice.placed.read_bytes
    assert not {size.format: size for size in twice.formats}["q4_k"].read_bytes

    in_prose(
        "Qwen3.5-397B on # GB in four odd machines (#, #, # and # GB, 1 Gbit/s): # GB in bf16, # GB in q4_k, # GB in "
        "q2_k, of which # GB lie on a disk: an estimated # tokens/s, and # with 32 GB more in one of them.",
        README,
        sum(ram), *ram, *(sizes[name].total_bytes / 1e9 for name in ("bf16", "q4_k", "q2_k")),
        found.placed.read_bytes / 1e9, found.decode_tokens_per_s, more.decode_tokens_per_s,
    )  # fmt: skip


def test_the_formula_has_its_constants() -> None:
    in_prose(
        "trunk    # ms + for each layer # ms + trunk's bytes",
        MODELS,
        constants.TOKEN_S * 1e3,
        constants.LAYER_S * 1e3,
    )
    in_prose(
        "round trip + # ms, and # ms for each further node", MODELS, constants.HOP_S * 1e3, constants.MESSAGE_S * 1e3
    )
    in_prose("*Speed* is # of what reading and multiplying allow together", MODELS, constants.STEP_SHARE)
    assert constants.JOIN == 3
    of_one = constants.TOKEN_PRODUCTS
    assert (min(of_one, key=of_one.__getitem__), max(of_one, key=of_one.__getitem__)) == ("f32", "q4_0")
    in_prose("do # (f32) to # (q4_0) of q4_k's products", MODELS, of_one["f32"], of_one["q4_0"])
    in_prose("absent, # for each byte are assumed", MODELS, constants.TOKEN_PRODUCTS_PER_BYTE)
    in_prose("chunks of # tokens", MODELS, constants.CHUNK_TOKENS)
    of_many = constants.PRODUCTS
    least, most = min(of_many.values()), max(of_many.values())
    assert least < constants.OTHER_PRODUCTS < most
    in_prose(
        "measured beside the bytes (# to # of it, by format; of bf16 and FP8 #,", MODELS, least, most, of_many["bf16"]
    )
    assert of_many["fp8_block"] == pytest.approx(of_many["bf16"], rel=0.02)
    in_prose("All else in a layer takes # µs for each token", MODELS, constants.COLUMN_S * 1e6)
    in_prose("absent # for each byte of `ram_Bps` are assumed", MODELS, constants.PRODUCTS_PER_BYTE)


def test_what_is_assumed_of_unmeasured_tiers_is_as_the_document_says() -> None:
    disk, vram = constants.DISK_BYTES_PER_S / 1e9, constants.VRAM_BYTES_PER_S / 1e9
    in_prose("unmeasured disk (# GB/s) and of a GPU's memory (# GB/s) is assumed", MODELS, disk, vram)


def test_the_ways_from_a_hub_id_have_the_sizes_of_the_shape() -> None:
    found = find_shape(NAME)
    assert found is not None
    for repository in re.findall(r"\b(?:Qwen|unsloth)/Qwen3\.5-397B[\w.:-]*", MODELS):
        assert find_shape(repository) == found
    bf16 = of_shape(NAME, found[1], "bf16")
    fp8, q4_k = bf16.in_format("fp8_block"), bf16.in_format("q4_k")
    in_prose("| GGUF in Q4_K | # GB | # GB |", MODELS, q4_k.total_bytes / 1e9, q4_k.expert_bytes / 1e9)
    in_prose("| FP8 | # GB | # GB |", MODELS, fp8.total_bytes / 1e9, fp8.expert_bytes / 1e9)
    in_prose(
        "| bf16, converted to q4_k | # GB, and the pack of # GB | # GB |",
        MODELS,
        bf16.total_bytes / 1e9,
        (bf16.trunk_bytes + q4_k.expert_bytes) / 1e9,
        q4_k.expert_bytes / 1e9,
    )
    in_prose(
        "# GB for the GGUF in q4_k, # GB for the FP8 release, # GB for bf16",
        MODELS,
        *(size / 1e9 for size in (q4_k.total_bytes, fp8.total_bytes, bf16.total_bytes)),
    )
