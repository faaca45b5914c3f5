"""Home machines over the internet, on paper: a simulation of failures and repair, and of one token's time.

Nothing here was measured; docs/scale.md lists every assumption below and says what follows. A machine's sessions and
pauses are exponential. When one goes, each expert that it held is copied from another holder to a machine that is on,
after the failure was noticed; an expert whose holders are all away is lost until one of them is back. A token waits
in each layer for the slowest of the machines that it needs; of an expert's holders the nearest is asked.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LAYERS, EXPERTS, TOP_K = 60, 512, 10
EXPERT_BYTES = 7_000_000
HIDDEN_BYTES = 4096  # of one token's hidden state on the wire, 8 bits a number
SESSION_S, PAUSE_S = 10 * 3600.0, 6 * 3600.0  # mean time that a home machine is on, and off
NOTICE_S = 10.0
UP_BPS = 20e6 / 8  # of a home line, bytes a second
COORDINATOR_UP_BPS = 200e6 / 8
RTT_MEDIAN_S, RTT_SPREAD = 0.040, 0.5  # log-normal, between two homes of one continent
BANDWIDTH_BPS = 40e9
DAYS = 2.0
REPLICATION = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Shares of the simulated time and means over it."""

    whole: float  # every expert had a holder
    token: float  # a token's experts all had one, in the mean
    copied_bytes_per_s: float  # by all machines together, to repair
    longest_s: float  # that some expert was lost


def simulate(nodes: int, seed: int) -> list[dict[str, Any]]:
    """One row for each level of replication."""
    rows = []
    for replication in REPLICATION:
        random = np.random.default_rng([seed, replication])
        outcome = _failures(nodes, replication, random)
        layer_s = _layer_seconds(replication, random)
        one = 1.0 / (LAYERS * layer_s)
        wire = COORDINATOR_UP_BPS / (LAYERS * TOP_K * HIDDEN_BYTES)
        rows.append(
            {
                "nodes": nodes,
                "replicas": replication,
                "gigabytes_a_node": replication * LAYERS * EXPERTS * EXPERT_BYTES / nodes / 1e9,
                "whole_model": outcome.whole,
                "token_served": outcome.token,
                "longest_gap_s": outcome.longest_s,
                "repair_MBps_a_node": outcome.copied_bytes_per_s / nodes / 1e6,
                "layer_ms": 1e3 * layer_s,
                "tokens_per_s_one_text": one * outcome.token,
                "tokens_per_s_most": wire * outcome.token,
            }
        )
    return rows


def _layer_seconds(replication: int, random: np.random.Generator) -> float:
    """Mean over draws: the slowest of TOP_K experts, each at the nearest of its holders."""
    rtt = np.exp(np.log(RTT_MEDIAN_S) + RTT_SPREAD * random.normal(size=(4000, TOP_K, replication)))
    return float(rtt.min(axis=2).max(axis=1).mean()) + EXPERT_BYTES / BANDWIDTH_BPS


def _failures(nodes: int, replication: int, random: np.random.Generator) -> Outcome:
    total = LAYERS * EXPERTS
    wanted = min(replication, nodes)
    # Holders of each expert; replicas that are on disk of a machine that is off come back with it.
    holders: list[set[int]] = [set() for _ in range(nodes)]  # node → experts
    alive = np.zeros(total, dtype=np.int32)
    on = random.random(nodes) < SESSION_S / (SESSION_S + PAUSE_S)
    on[: max(1, wanted)] = True
    running = np.flatnonzero(on)
    for expert, row in enumerate(_distinct(running, total, wanted, random)):
        for node in row:
            holders[node].add(expert)
        alive[expert] = len(row)
    events: list[tuple[float, int, int, int]] = []  # time, kind (0 off, 1 on, 2 repaired), node, expert
    for node in range(nodes):
        mean = SESSION_S if on[node] else PAUSE_S
        heapq.heappush(events, (float(random.exponential(mean)), 0 if on[node] else 1, node, 0))
    end, now, lost = DAYS * 86_400, 0.0, int((alive == 0).sum())
    whole = token = copied = gap = longest = 0.0
    # A token's chance to need none of the lost experts, experts being used alike.
    while events and events[0][0] < end:
        at, kind, node, expert = heapq.heappop(events)
        span, now = at - now, at
        whole += span * (lost == 0)
        token += span * (1 - TOP_K / EXPERTS) ** lost
        gap = gap + span if lost else 0.0
        longest = max(longest, gap)
        if kind == 2:
            if on[node] and expert not in holders[node] and alive[expert]:  # else nobody is left to copy from
                holders[node].add(expert)
                alive[expert] += 1
                copied += EXPERT_BYTES
            continue
        held = np.fromiter(holders[node], dtype=np.int64, count=len(holders[node]))
        if kind == 0:
            on[node] = False
            alive[held] -= 1
            lost += int((alive[held] == 0).sum())
            heapq.heappush(events, (now + float(random.exponential(PAUSE_S)), 1, node, 0))
            short = held[alive[held] > 0]
            others = np.flatnonzero(on)
            if len(short) and len(others):
                targets = random.choice(others, size=len(short))
                # Each target's line takes its share; the sources are many.
                busy = EXPERT_BYTES / UP_BPS
                for expert_, target in zip(short.tolist(), targets.tolist(), strict=True):
                    heapq.heappush(events, (now + NOTICE_S + busy * (1 + random.random()), 2, target, expert_))
        else:
            on[node] = True
            back = held[alive[held] == 0]
            lost -= len(back)
            surplus = held[alive[held] >= wanted]  # was repaired meanwhile: dropped
            alive[held] += 1
            alive[surplus] -= 1
            holders[node] -= set(surplus.tolist())
            heapq.heappush(events, (now + float(random.exponential(SESSION_S)), 0, node, 0))
    span = end - now
    whole += span * (lost == 0)
    token += span * (1 - TOP_K / EXPERTS) ** lost
    return Outcome(whole / end, token / end, copied / end, max(longest, gap + span if lost else 0.0))


def _distinct(
    running: npt.NDArray[np.int64], rows: int, count: int, random: np.random.Generator
) -> npt.NDArray[np.int64]:
    """For each row `count` different machines."""
    count = min(count, len(running))
    return np.stack([running[random.permutation(len(running))[:count]] for _ in range(rows)])
