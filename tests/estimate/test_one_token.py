"""Reading and multiplying with one token: against kernels that were timed, and what must always hold."""

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.coordinator.estimate.cluster import Cluster, Machine, Tier
from moehive.coordinator.estimate.constants import STEP_SHARE
from moehive.coordinator.estimate.geometries import MODELS
from moehive.coordinator.estimate.holding import hold
from moehive.coordinator.estimate.model import ATTENTION, LATENT, SHARED, Model, of_shape
from moehive.coordinator.estimate.one_token import part_speed, tier_speeds
from moehive.coordinator.estimate.step import decode_step

# Experts of 2048 x 512 on a Zen 4 with VNNI and bf16, one thread, two, and two while memory gave more: GB/s in q8_0,
# billion products in q4_k in caches, GB/s in other formats.
TIMED = [
    (28.5, 70.2, {
        "bf16": 30.5, "f16": 28.6, "q4_0": 27.3, "q4_1": 28.1, "q5_0": 26.7, "q5_1": 24.8, "iq4_nl": 27.1,
        "q2_k": 19.4, "q3_k": 20.6, "q4_k": 25.2, "q5_k": 24.4, "q6_k": 25.0, "iq4_xs": 25.7, "int4_g32": 27.4,
        "int4_g64": 26.8, "int4_g128": 26.5, "mxfp4": 26.8, "fp8_block": 25.4,
    }),
    (34.1, 114.4, {
        "bf16": 35.2, "f16": 34.5, "q4_0": 33.3, "q4_1": 33.9, "q5_0": 33.7, "q5_1": 33.9, "iq4_nl": 33.5,
        "q2_k": 31.5, "q3_k": 32.7, "q4_k": 33.4, "q5_k": 33.3, "q6_k": 33.4, "iq4_xs": 33.4, "int4_g32": 33.7,
        "int4_g64": 33.8, "int4_g128": 33.7, "mxfp4": 34.0, "fp8_block": 33.8,
    }),
    (45.8, 114.4, {
        "q4_0": 45.3, "q2_k": 33.3, "q3_k": 36.2, "q4_k": 43.2, "q5_k": 41.6, "q6_k": 42.7, "mxfp4": 43.4,
    }),
]  # fmt: skip


@functools.cache
def model(format: str, name: str = "qwen3-30b") -> Model:
    return of_shape(name, MODELS[name], "bf16").in_format(format)  # type: ignore[arg-type]


def machine(read: float, products: float | None) -> Machine:
    return Machine("m", coordinator=True, ram=Tier(2 * 10**12, read), token_products_per_s=products)


def speed(format: str, read: float, products: float | None) -> float:
    return tier_speeds(model(format), machine(read, products))["ram"] / STEP_SHARE


@pytest.mark.parametrize(("read", "products", "formats"), TIMED)
def test_kernels_were_timed_at_what_is_expected(read: float, products: float, formats: dict[str, float]) -> None:
    found = {format: speed(format, read * 1e9, products * 1e9) / timed / 1e9 for format, timed in formats.items()}
    assert not {format: ratio for format, ratio in found.items() if not 0.8 < ratio < 1.15}
    assert 0.9 < sum(found.values()) / len(found) < 1.05


READS, PRODUCTS = st.floats(1e9, 1e12), st.floats(1e9, 1e14)
FORMATS = st.sampled_from([*TIMED[0][2], "q8_0"])


@settings(deadline=None)
@given(READS, st.floats(2, 1e4))
def test_q8_0_is_read_as_fast_as_was_measured(read: float, products_a_byte: float) -> None:
    """Its products are in what was measured."""
    assert speed("q8_0", read, products_a_byte * read) == pytest.approx(read)


@settings(deadline=None)
@given(READS, PRODUCTS, FORMATS)
def test_nothing_is_quicker_than_its_products_or_much_quicker_than_memory(
    read: float, products: float, format: str
) -> None:
    found = speed(format, read, products)
    known = model(format)
    weights = sum(layer.experts * layer.spec.weights for layer in known.layers)
    assert 0 < found * weights / known.expert_bytes < 1.2 * products  # the quickest format does 1.14 of q4_k's
    assert found < 2.01 * read
    if (
        format != "bf16" and products > 2 * read
    ):  # bf16 takes less for a byte than q8_0, in which the reading was measured
        assert found <= 1.0001 * speed(format, read, 2 * products)
    assert speed(format, read, 1e4 * read) == pytest.approx(read, rel=1e-6)  # cores enough


def test_where_arithmetic_is_the_bound_bytes_do_not_count() -> None:
    """A format of half the bytes a weight is as slow, product by product."""
    slow = {format: speed(format, 1e12, 1e10) / model(format).expert_bytes for format in ("q4_k", "mxfp4", "q5_k")}
    assert slow["mxfp4"] == pytest.approx(0.92 * slow["q4_k"], rel=1e-3)
    assert slow["q5_k"] == pytest.approx(0.74 * slow["q4_k"], rel=1e-3)


def test_where_nobody_measured_there_are_cores_enough() -> None:
    for format in ("q4_k", "q2_k", "mxfp4", "bf16", "fp8_block"):
        assert 0.9 < speed(format, 5e10, None) / 5e10 < 1.01


def test_arithmetic_is_no_bound_on_a_gpu_or_a_disk() -> None:
    whole = replace(machine(5e10, 1e9), vram=Tier(10**10, 4e11), disk=Tier(10**12, 2e9))
    found = tier_speeds(model("q4_k"), whole)
    assert found["vram"] == STEP_SHARE * 4e11 and found["disk"] == 2e9 and found["ram"] < 1e9
    assert tier_speeds(model("q4_k"), Machine("m", disk=Tier(10**12, 2e9))) == {"disk": 2e9}


def test_parts_of_a_trunk_are_read_in_their_own_formats() -> None:
    of = machine(3e10, 7e10)
    kimi, bf16 = model("q4_k", "kimi-k2"), model("bf16", "kimi-k2")
    assert part_speed(kimi, of, SHARED) == tier_speeds(kimi, of)["ram"]
    # Experts alone are in such a format; the rest is in bf16.
    assert part_speed(model("mxfp4", "gpt-oss-120b"), of, ATTENTION) == pytest.approx(tier_speeds(bf16, of)["ram"])
    # Latent attention's matrices are in 16 bits whatever the file has, and computed otherwise: 0.9 ms of 17 MB.
    assert part_speed(kimi, of, LATENT) == part_speed(bf16, of, LATENT) < part_speed(bf16, of, ATTENTION)
    assert 17e6 * STEP_SHARE / part_speed(kimi, of, LATENT) == pytest.approx(0.85e-3, rel=0.15)


def test_a_token_waits_for_arithmetic_where_that_is_the_bound() -> None:
    """All of a step grows with the products, but for what is fixed."""
    known = model("q4_k")
    steps = []
    for products in (2e9, 1e9):
        cluster = Cluster(0.0, 1e9, (replace(machine(1e12, products), step_factor=1e-9),))
        steps.append(decode_step(known, cluster, hold(known, cluster)))
    assert steps[1].trunk_s == pytest.approx(2 * steps[0].trunk_s, rel=1e-3)
    assert steps[1].experts_s == pytest.approx(2 * steps[0].experts_s, rel=1e-3)
