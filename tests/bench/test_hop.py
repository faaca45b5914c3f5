"""The hop's measurement: real processes answer over every kind of link."""

from contextlib import ExitStack
from typing import Any

import pytest

from moehive.coordinator.bench.hop import HopProcesses
from moehive.coordinator.bench.hop_case import CHUNK_BYTES, LINK, PAYLOADS, SLOWER_LINK, HopCase, HopRow, summary
from moehive.coordinator.bench.kernel_link import shaper


@pytest.mark.parametrize("link", ["loopback", str(LINK)])
def test_every_way_is_measured(link: str) -> None:
    cases = [HopCase(nodes, 8192, tls, link) for nodes, tls in ((1, False), (2, True))]
    cases.append(HopCase(1, 8192, True, link, dtype="bfloat16", exact=True))
    cases.append(HopCase(2, 1 << 20, True, link, chain=True))
    rows = [HopRow(case) for case in cases]
    exact = HopRow(HopCase(1, 1 << 20, True, link, exact=True, prefill=True))
    chain = HopRow(HopCase(2, 1 << 20, True, link, chain=True, prefill=True))
    by_bytes = [] if link == "loopback" else [exact, chain]
    with ExitStack() as stack:
        processes = HopProcesses(stack, 2)
        for row in rows + by_bytes:
            processes.measure(row, 4)
    for row in by_bytes:
        assert len(row.ours) == len(row.compute) == 4 and row.raw == row.plain == []
        assert row.made_by == str(shaper() or "proxy")
        assert row.figures()["raw_share"] == row.figures()["plain_ratio"] == 0
    # Out and back; a little goes before the rate counts.
    assert all(seconds >= 2 * 0.9 * exact.case.payload_bytes * 8 / LINK.bits_per_s for seconds in exact.ours)
    for row in rows:
        assert len(row.ours) == len(row.compute) == len(row.raw) == len(row.plain) == 4
        assert min(row.compute) > 0 and (row.case.chain or not row.eight_bit)  # 8 KiB are not worth it
        figures = row.figures()
        assert 0 < figures["p50_us"] <= figures["p99_us"]
        if link != "loopback":  # twice the delay, at the least
            assert min(row.ours + row.raw + row.plain) >= 2 * LINK.delay_s


def row(seconds: float, *arguments: Any, compute: float = 0.0, **named: Any) -> HopRow:
    return HopRow(HopCase(*arguments, **named), ours=[seconds], compute=[compute], raw=[1e-3], plain=[4e-3])


def test_printed_rows_say_whether_states_travelled_exactly() -> None:
    exact, rounded = (row(1e-3, 1, PAYLOADS[-1], True, str(LINK), exact=exact) for exact in (True, False))
    assert {name for name, value in exact.figures().items() if value != rounded.figures()[name]} == {"exact"}


def test_the_summary_is_of_the_rows_that_it_names() -> None:
    small, large, slow = PAYLOADS[0], PAYLOADS[-1], str(LINK)
    rows = [
        row(2e-3, 1, small, False, "loopback"),
        row(3e-3, 1, small, True, "loopback"),
        row(4e-3, 1, large, False, "loopback"),
        row(5e-3, 1, small, True, slow),
        row(6e-3, 4, small, True, slow),
    ]
    for link, star, chain in ((slow, 8e-3, 4e-3), (str(SLOWER_LINK), 6e-2, 2e-2)):
        rows.append(row(star, 4, CHUNK_BYTES, True, link, prefill=True))
        rows.append(row(chain, 4, CHUNK_BYTES, True, link, chain=True, prefill=True))
    for dtype, exact, rounded in (("float32", 9e-3, 2e-3), ("bfloat16", 5e-3, 3e-3)):
        rows.append(row(exact, 1, large, True, slow, dtype, True, prefill=True, compute=1e-3))
        rows.append(row(rounded, 1, large, True, slow, dtype, prefill=True, compute=1e-3))
    assert summary(rows) == pytest.approx(
        {
            "plain_ratio": 0.5,
            "tls_ratio": 1.5,
            "four_nodes_ratio": 1.2,
            "raw_share_of_1_mib": 0.25,
            "added_us_on_loopback": 2000,
            "added_us_on_slow_link": 4000,
            "prefill_gain_of_8_bits_float32": 10 / 3,
            "prefill_gain_of_8_bits_bfloat16": 1.5,
            f"prefill_gain_of_a_chain_of_four, {LINK}": 2,
            f"prefill_gain_of_a_chain_of_four, {SLOWER_LINK}": 3,
        }
    )
