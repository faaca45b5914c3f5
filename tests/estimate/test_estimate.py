"""Estimates: sizes as published, the arithmetic by hand, and what must always hold."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moehive.coordinator.cli.main import app
from moehive.coordinator.estimate import headers
from moehive.coordinator.estimate.cluster import Cluster, Machine, Tier, write_cluster
from moehive.coordinator.estimate.constants import (
    CHUNK_TOKENS,
    COLUMN_S,
    COORDINATOR_BYTES,
    HOP_S,
    LAYER_S,
    NODE_BYTES,
    PRODUCTS_PER_BYTE,
    STEP_SHARE,
    TOKEN_S,
)
from moehive.coordinator.estimate.estimate import estimate, in_all_formats
from moehive.coordinator.estimate.geometries import MODELS, find_shape
from moehive.coordinator.estimate.holding import hold, room_for_weights
from moehive.coordinator.estimate.mixture import within
from moehive.coordinator.estimate.model import Model, of_shape
from moehive.coordinator.estimate.step import decode_step, distinct, prefill_rate
from moehive.coordinator.precision.candidates import CANDIDATES
from moehive.coordinator.types import CoordinatorError

GB = 10**9
CORES = 1e15  # products a second of so many that nothing is left of them beside the reading
BIG = Machine("big", coordinator=True, ram=Tier(2000 * GB, 100e9), token_products_per_s=CORES)


def model(name: str = "qwen3-30b", format: str = "q4_0") -> Model:
    return of_shape(name, MODELS[name], "bf16").in_format(format)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hub_id", "billions", "active"),
    [
        ("Qwen/Qwen3.5-397B-A17B", 397, 17),
        ("Qwen/Qwen3.5-35B-A3B", 35, 3),
        ("unsloth/Qwen3-30B-A3B-GGUF", 30.5, 3.3),
        ("Qwen/Qwen3-235B-A22B-Instruct-2507", 235, 22),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 80, 3.9),
        ("moonshotai/Kimi-K2-Instruct", 1026, 32),
        ("deepseek-ai/DeepSeek-V3-0324", 671, 37),
        ("deepseek-ai/DeepSeek-R1", 671, 37),
        ("zai-org/GLM-4.5", 355, 32),
        ("zai-org/GLM-4.5-Air-FP8", 106, 12),
        ("openai/gpt-oss-120b", 117, 5.1),
        ("openai/gpt-oss-20b", 21, 3.6),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7, 12.9),
        ("mistralai/Mixtral-8x22B-v0.1", 141, 39),
    ],
)
def test_the_table_has_the_sizes_that_were_published(hub_id: str, billions: float, active: float) -> None:
    found = find_shape(hub_id)
    assert found is not None
    known = of_shape(*found, "bf16")
    assert known.weights / 1e9 == pytest.approx(billions, rel=0.015)
    assert known.active_weights / 1e9 == pytest.approx(active, rel=0.16)  # publishers count the embedding or do not
    assert known.total_bytes == pytest.approx(2 * known.weights, rel=0.01)


def test_names_that_only_begin_like_a_known_one_are_not_taken_for_it() -> None:
    assert find_shape("deepseek-ai/DeepSeek-V3.2") is None
    assert find_shape("deepseek-ai/DeepSeek-R1-Distill-Llama-70B") is None
    assert find_shape("someone/qwen3-30b-a3bx") is None
    assert find_shape("meta-llama/Llama-3.1-8B") is None


def test_one_machine_has_no_hop_and_reads_its_bytes() -> None:
    known = model()
    cluster = Cluster(0.01, 1e6, (BIG,))
    step = decode_step(known, cluster, hold(known, cluster))
    speed = 100e9 * STEP_SHARE
    assert step.hop_s == 0
    assert step.experts_s == pytest.approx(known.active_expert_bytes / speed)
    fixed = TOKEN_S + known.decoder_layers * LAYER_S
    assert step.trunk_s == pytest.approx(fixed + known.trunk_bytes_a_token / speed)


def test_each_layer_pays_the_round_trip() -> None:
    known = model()
    node = Machine("node", ram=Tier(200 * GB, 100e9))
    small = replace(BIG, ram=Tier(known.trunk_bytes + 3 * GB, 100e9))  # no room for experts beside the trunk
    near = Cluster(0.0, 1e12, (small, node))
    far = replace(near, rtt_s=0.003)
    placed = hold(known, near)
    if placed.holdings[0].expert_bytes:  # what is left of 3 GB after the program and the cache
        small = replace(small, ram=Tier(small.ram.nbytes - placed.holdings[0].expert_bytes, 100e9))  # type: ignore[union-attr]
        near, far = replace(near, machines=(small, node)), replace(far, machines=(small, node))
    times = [decode_step(known, c, hold(known, c)) for c in (near, far)]
    assert times[1].hop_s - times[0].hop_s == pytest.approx(48 * 0.003, rel=1e-6)
    assert times[0].hop_s == pytest.approx(48 * HOP_S, rel=1e-3)
    found = estimate({"q4_0": known}, far)
    assert any("Wi-Fi" in sentence and "48 layers" in sentence for sentence in found.warnings)
    assert not estimate({"q4_0": known}, replace(far, rtt_s=0.0003)).warnings


def test_products_that_were_measured_count_for_prompts() -> None:
    """As many as AVX2's beside the same memory change nothing; more make prompts quicker, and no token."""
    measured = Cluster(0.0, 1e9, (replace(BIG, products_per_s=PRODUCTS_PER_BYTE * 100e9),))
    plain, quick = (replace(measured, machines=(replace(BIG, products_per_s=one),)) for one in (None, 1e12))
    for format in ("q8_0", "q4_k", "bf16", "fp8_block"):
        known = model(format=format)
        rates = [prefill_rate(known, one, hold(known, one)) for one in (plain, measured, quick)]
        assert rates[0] == pytest.approx(rates[1]) and rates[2] > 1.2 * rates[0]
        assert len({decode_step(known, one, hold(known, one)) for one in (plain, measured, quick)}) == 1


def test_a_prompt_is_what_is_read_and_multiplied_and_done_beside() -> None:
    """By hand, of one machine whose experts are all read by a chunk."""
    known = of_shape("m", MODELS["qwen3-30b"], "q8_0", experts=8)
    cluster = Cluster(0.0, 1e9, (replace(BIG, products_per_s=1e12, step_factor=0.5),))
    nbytes, tokens = known.trunk_bytes_a_token + known.expert_bytes, CHUNK_TOKENS
    experts = sum((tokens * layer.top_k - layer.experts) * layer.spec.weights for layer in known.layers)
    fixed = 0.5 * (TOKEN_S + known.decoder_layers * (LAYER_S + tokens * known.hidden * COLUMN_S))
    seconds = fixed + nbytes / (100e9 * STEP_SHARE) + ((tokens - 1) * known.trunk_weights + experts) / 1e12
    assert prefill_rate(known, cluster, hold(known, cluster)) == pytest.approx(tokens / seconds)


def test_a_prompts_hidden_states_travel_in_8_bits_where_the_link_is_slow() -> None:
    known = model()
    node = Machine("node", ram=Tier(200 * GB, 100e9))
    small = replace(BIG, ram=Tier(known.trunk_bytes + COORDINATOR_BYTES + 8192 * known.kv_bytes_a_token, 100e9))
    seconds = []
    for bandwidth in (1e15, 1.25e8, 1.25e9):
        cluster = Cluster(0.0, bandwidth, (small, node))
        placed = hold(known, cluster)
        assert not placed.holdings[0].expert_bytes
        seconds.append(128 / prefill_rate(known, cluster, placed))
    numbers = 48 * 128 * 2048
    assert seconds[1] - seconds[0] == pytest.approx(numbers * 2 * 68 / 64 / 1.25e8, rel=1e-3)
    assert seconds[2] - seconds[0] == pytest.approx(numbers * 6 / 1.25e9, rel=1e-3)


def test_a_shared_expert_hides_as_much_of_the_waiting_as_it_takes() -> None:
    """On machines of their own: what the coordinator waits for is what the nodes take longer than it does."""
    known = model("kimi-k2")
    node = Machine("node", ram=Tier(2000 * GB, 100e9), token_products_per_s=CORES)
    beside = known.trunk_bytes + COORDINATOR_BYTES + 8192 * known.kv_bytes_a_token
    small = replace(BIG, ram=Tier(beside, 100e9))
    cluster = Cluster(0.0003, 1e12, (small, node))
    without = replace(known, parts={**known.parts, "shared experts": ()})
    alone, hidden = (decode_step(m, cluster, hold(m, cluster)) for m in (without, known))
    speed = 100e9 * STEP_SHARE
    assert not hold(known, cluster).holdings[0].expert_bytes
    assert hidden.trunk_s - alone.trunk_s == pytest.approx(60 * known.shared_bytes_a_layer / speed)
    assert hidden.seconds == pytest.approx(alone.seconds, rel=0.005)  # the nodes take longer, so it costs nothing
    slow = replace(cluster, machines=(replace(small, ram=Tier(beside, 1e9)), node))
    assert decode_step(known, slow, hold(known, slow)).hop_s == 0  # it takes longer than they


def test_recurrent_state_is_as_large_as_transformers_makes_it() -> None:
    """Qwen3.5's and Qwen3-Next's linear attention: one f32 matrix for each head of each such layer."""
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    config = Qwen3NextConfig(num_hidden_layers=48)
    heads, key, value = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
    query = torch.zeros(1, 1, heads, key)
    _, state = torch_recurrent_gated_delta_rule(
        query, query, torch.zeros(1, 1, heads, value), torch.zeros(1, 1, heads), torch.zeros(1, 1, heads),
        initial_state=None, output_final_state=True,
    )  # fmt: skip
    layers = sum(kind == "linear_attention" for kind in config.layer_types)
    found = find_shape("Qwen/Qwen3-Next-80B-A3B-Instruct")
    assert found is not None
    assert of_shape(*found, "bf16").state_bytes == layers * state.nbytes
    assert headers._state_bytes(config) == layers * state.nbytes
    assert model("qwen3-30b").state_bytes == 0


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_distinct_experts_are_what_chance_gives(batch: int) -> None:
    layer = model("qwen3.5-35b").layers[0]
    counts = distinct(layer, [1, 1], batch)
    expected = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** batch)
    assert counts.sum(1).mean() == pytest.approx(expected, rel=0.03)
    assert counts.sum(1).max() <= min(layer.experts, batch * layer.top_k)
    if batch == 1:
        assert (counts.sum(1) == layer.top_k).all()
        assert counts.max(1).mean() > layer.top_k / 2  # the slowest of two has more than half


machines = st.builds(
    Machine,
    st.just("m"),
    st.just(False),
    st.none() | st.builds(Tier, st.integers(1, 80 * GB), st.floats(1e11, 2e12)),
    st.none() | st.builds(Tier, st.integers(1, 200 * GB), st.floats(5e9, 4e11)),
    st.none() | st.builds(Tier, st.integers(1, 2000 * GB), st.floats(1e8, 7e9)),
)
clusters = st.builds(
    lambda rtt, bandwidth, ram, others: Cluster(
        rtt,
        bandwidth,
        (replace(BIG, ram=Tier(ram, 5e10)), *(replace(m, name=f"m{n}") for n, m in enumerate(others))),
    ),
    st.floats(0, 0.01), st.floats(1e6, 1e10), st.integers(GB, 300 * GB), st.lists(machines, max_size=5),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(clusters, st.sampled_from(["q4_k", "bf16", "mxfp4"]), st.sampled_from(["qwen3-30b", "kimi-k2"]))
def test_bytes_are_conserved_and_no_memory_holds_more_than_it_has(cluster: Cluster, format: str, name: str) -> None:
    known = model(name, format)
    placed = hold(known, cluster)
    held = sum(holding.expert_bytes for holding in placed.holdings)
    assert held + placed.missing_bytes == pytest.approx(known.expert_bytes, abs=100)
    for holding in placed.holdings:
        machine = holding.machine
        beside = holding.trunk_bytes + holding.kv_bytes + COORDINATOR_BYTES if machine.coordinator else NODE_BYTES
        ram = max(0, machine.ram.nbytes - beside) if machine.ram else 0
        assert holding.ram_bytes <= ram and (ram or not holding.expert_bytes)
        assert holding.disk_bytes <= (machine.disk.nbytes + ram - holding.ram_bytes if machine.disk else 0)
        assert holding.vram_bytes == min(holding.expert_bytes, machine.vram.nbytes if machine.vram else 0)
        assert sum(holding.read_from().values()) == holding.expert_bytes
        assert holding.read_from().get("ram", 0) <= ram
    memory = sum(m.ram.nbytes for m in cluster.machines if m.ram)
    if placed.read_bytes and memory > known.total_bytes + len(cluster.machines) * GB + placed.holdings[0].kv_bytes:
        raise AssertionError("a disk is used though memory is left")
    if held:
        step = decode_step(known, cluster, placed)
        assert step.seconds > 0
        far = replace(cluster, rtt_s=cluster.rtt_s + 0.001)
        assert decode_step(known, far, placed).seconds >= step.seconds


def test_the_best_format_that_memory_holds_is_chosen() -> None:
    models = in_all_formats(model())
    room = replace(BIG, ram=Tier(24 * GB, 100e9))
    found = estimate(models, Cluster(0.0, 1e9, (room,)))
    beside = COORDINATOR_BYTES + found.placed.holdings[0].kv_bytes
    wanted = next(name for name, known in models.items() if known.total_bytes + beside <= 24 * GB)
    assert found.fits and found.model.format == wanted != "bf16"
    assert estimate(models, Cluster(0.0, 1e9, (BIG,))).model.format == "bf16"
    assert estimate(models, Cluster(0.0, 1e9, (BIG,)), format="q2_k").model.format == "q2_k"
    with pytest.raises(CoordinatorError, match="not to be had in q1_0"):
        estimate(models, Cluster(0.0, 1e9, (BIG,)), format="q1_0")


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.sampled_from(["bf16", "fp8_block"]), st.sampled_from([3, 48]))
def test_a_budget_is_filled_by_two_neighbours(share: float, stored: str, layers: int) -> None:
    """Bytes are the budget's but for a part of an expert, and a step takes as long as they let it."""
    best = of_shape("m", MODELS["qwen3-30b"], "bf16", layers=layers).in_format(stored)  # type: ignore[arg-type]
    others = {fmt: best.in_format(fmt) for fmt in CANDIDATES} | {stored: best}
    sizes = [other.total_bytes for other in others.values()]
    budget = int(min(sizes) + share * (best.total_bytes - min(sizes)))
    mixed = within({stored: best}, budget, CANDIDATES)
    if not mixed.mixture:
        assert mixed.total_bytes == budget and mixed.format in (stored, "q2_k")
        return
    large, small = (others[fmt] for fmt, _ in mixed.mixture)
    assert small.total_bytes <= mixed.total_bytes <= budget < large.total_bytes
    assert not any(small.total_bytes < size < large.total_bytes for size in sizes)
    assert budget - mixed.total_bytes <= large.layers[0].spec.nbytes + 1000  # and a byte for each matrix of the trunk
    assert sum(part for _, part in mixed.mixture) == pytest.approx(1)
    counts = [layer.formats.count((large.format, large.format)) for layer in mixed.layers]  # type: ignore[arg-type]
    assert max(counts) - min(counts) <= 1 and {len(layer.formats) for layer in mixed.layers} == {128}
    cluster = Cluster(0.0, 1e9, (BIG,))
    seconds = [decode_step(one, cluster, hold(one, cluster)).seconds for one in (small, mixed, large)]
    assert 0.999 * min(seconds[::2]) <= seconds[1] <= 1.001 * max(seconds[::2])


def test_a_budget_that_no_format_keeps_is_said() -> None:
    found = estimate(in_all_formats(model()), Cluster(0.0, 1e9, (BIG,)), 5 * GB)
    assert found.model.format == "q2_k" and "keeps within the budget of 5.0 GB" in found.warnings[0]


def test_a_clusters_budget_is_what_a_conversion_has(tmp_path: Path) -> None:
    cluster = Cluster(0.0003, 1.25e8, (replace(BIG, ram=Tier(16 * GB, 5e10)), Machine("n", ram=Tier(8 * GB, 6e10))))
    write_cluster(tmp_path / "cluster.toml", cluster)
    known = model(format="bf16")
    room = room_for_weights(known, cluster)
    done = CliRunner().invoke(
        app, ["estimate", "qwen3-30b", "--budget", "cluster", "--cluster", str(tmp_path / "cluster.toml"), "--json"]
    )
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert row["fits"] and room - 2e7 < row["total_bytes"] <= room
    assert sum(row["mixture"].values()) == pytest.approx(1) and row["format"] == " and ".join(row["mixture"])
    told = CliRunner().invoke(
        app, ["estimate", "qwen3-30b", "--budget", str(room), "--cluster", str(tmp_path / "cluster.toml")]
    )
    assert "It fills the budget with" in told.stdout and "for what `moehive convert --budget` chooses" in told.stdout


def test_what_a_cluster_leaves_for_weights_is_what_fits() -> None:
    node = Machine("node", vram=Tier(24 * GB, 9e11), ram=Tier(12 * GB, 6e10))  # without a disk
    cluster = Cluster(0.0003, 1.25e8, (replace(BIG, ram=Tier(12 * GB, 5e10)), node))
    known = model()
    room = room_for_weights(known, cluster)
    beside = COORDINATOR_BYTES + NODE_BYTES + hold(known, cluster).holdings[0].kv_bytes
    assert 24 * GB - room == beside + 2 * known.layers[0].spec.nbytes
    found = {(one.total_bytes <= room, hold(one, cluster).fits) for one in in_all_formats(known).values()}
    assert found == {(True, True), (False, False)}


def test_what_does_not_fit_says_what_is_missing_and_what_would_help() -> None:
    models = in_all_formats(model("qwen3.5-397b"))
    machines = (replace(BIG, ram=Tier(32 * GB, 5e10)), Machine("node", ram=Tier(96 * GB, 6e10)))
    found = estimate(models, Cluster(0.0003, 1.25e8, machines))
    assert not found.fits and found.model.format == "q2_k"
    assert found.row()["missing_bytes"] > 0
    assert any("does not fit" in sentence for sentence in found.warnings)
    assert found.advice and found.advice[0].fits  # one more machine, or 32 GB more, does it
    with_disk = (machines[0], replace(machines[1], disk=Tier(500 * GB, 3e9)))
    slow = estimate(models, Cluster(0.0003, 1.25e8, with_disk))
    assert slow.fits and slow.placed.read_bytes > 0
    assert any("lie on disks" in sentence for sentence in slow.warnings)
    assert slow.decode_tokens_per_s < found.decode_tokens_per_s


def test_machines_without_room_for_anything_are_told_so() -> None:
    tiny = Cluster(0.0003, 1.25e8, (replace(BIG, ram=Tier(1, 5e10)), Machine("node", ram=Tier(1, 6e10))))
    found = estimate(in_all_formats(model()), tiny)
    assert not found.fits and found.row()["missing_bytes"] >= found.model.total_bytes
    assert any("does not fit" in sentence for sentence in found.warnings)


def test_the_command_needs_no_network(tmp_path: Path) -> None:
    cluster = Cluster(0.0003, 1.25e8, (replace(BIG, ram=Tier(64 * GB, 5e10)), Machine("n", ram=Tier(192 * GB, 6e10))))
    write_cluster(tmp_path / "cluster.toml", cluster)
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", "estimate", "Qwen/Qwen3.5-397B-A17B"]
    command += ["--cluster", str(tmp_path / "cluster.toml")]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HTTPS_PROXY": "http://127.0.0.1:1"}
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, env=offline)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row.keys() >= {"fits", "total_bytes", "decode_tokens_per_s", "prefill_tokens_per_s", "load_s", "nodes"}
    assert row["fits"] is True and row["format"] in ("q4_k", "mxfp4", "q4_0", "int4_g32")
    assert sum(node["ram_bytes"] for node in row["nodes"]) == pytest.approx(row["expert_bytes"], abs=100)
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, env=offline)
    assert told.returncode == 0 and "what would help" in told.stdout
    assert "the hub cannot be reached" in told.stderr and "qwen3.5-397b of the built-in table" in told.stderr
    command[-3] = "nobody/no-such-model"
    refused = subprocess.run(command, capture_output=True, text=True, timeout=120, env=offline)
    assert refused.returncode == 1 and refused.stderr.startswith(
        "moehive: There is no directory nobody/no-such-model, and"
    )


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """Brackets in them are no markup of the terminal's library."""
    machines = (replace(BIG, name="[/red]"), Machine("[bold]", ram=Tier(64 * GB, 6e10)))
    write_cluster(tmp_path / "cluster.toml", Cluster(0.0003, 1.25e8, machines))
    told = CliRunner().invoke(app, ["estimate", "qwen3-30b", "--cluster", str(tmp_path / "cluster.toml")])
    assert told.exit_code == 0 and "[/red]" in told.stdout and "[bold]" in told.stdout


def test_advice_is_ranked_by_what_it_brings() -> None:
    """What makes it fit comes first, and of what is alike in that the quickest; nothing that does not help."""
    models = in_all_formats(model("qwen3.5-397b"))
    far = 0.005
    slow = Machine("slow", ram=Tier(64 * GB, 3e10))
    cluster = Cluster(far, 1.25e8, (replace(BIG, ram=Tier(48 * GB, 5e10)), slow))
    roomy = replace(
        cluster, machines=(replace(BIG, ram=Tier(100 * GB, 5e10)), replace(slow, ram=Tier(100 * GB, 3e10)))
    )
    for found in (estimate(models, cluster), estimate(models, cluster, format="q4_k"), estimate(models, roomy)):
        assert found.advice
        order = [(not one.fits, -one.decode_tokens_per_s) for one in found.advice]
        assert order == sorted(order)
        assert all(
            (one.fits and not found.fits) or one.decode_tokens_per_s > found.decode_tokens_per_s
            for one in found.advice
        )
    # Where all fits and 5 ms are waited for in each of 60 layers, cables bring most.
    assert found.fits and not found.placed.read_bytes
    assert found.advice[0].what.startswith("cables")
    # Where it does not fit, nothing that only makes it quicker comes before what makes it fit.
    short = estimate({"q2_k": models["q2_k"]}, cluster)
    assert not short.fits and short.advice[0].fits and "RAM" in short.advice[0].what + short.advice[1].what
    assert not any(one.fits for one in short.advice if one.what.startswith(("cables", "a GPU")))


def test_a_node_that_slows_all_down_is_named() -> None:
    """A token that hits one expert of a slow machine waits for it, however small that machine's share is."""
    known = model()
    slow = Machine("slow", ram=Tier(64 * GB, 4e9), token_products_per_s=CORES)
    quick = Machine("quick", ram=Tier(64 * GB, 100e9), token_products_per_s=CORES)
    big = replace(BIG, ram=Tier(12 * GB, 100e9))
    near = Cluster(0.0, 1e12, (big, quick, slow))
    found = {one.what: one.decode_tokens_per_s for one in estimate({"q4_0": known}, near).advice}
    without = replace(near, machines=(big, quick))
    assert found["to leave out slow"] == pytest.approx(estimate({"q4_0": known}, without).decode_tokens_per_s)
    assert "to leave out quick" not in found
    # Nobody is told to leave out what there is no room without.
    assert not any("alone" in what for what in found)
    roomy = replace(near, machines=(BIG, quick, replace(slow, ram=Tier(64 * GB, 50e9))))
    assert any(one.what == "big alone, without any node" for one in estimate({"q4_0": known}, roomy).advice)
