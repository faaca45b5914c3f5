"""Replanning: nothing moves under traffic that stays as it is; a change that pays is followed."""

import numpy as np
import pytest

from moehive.coordinator.placement import plan as planning
from moehive.coordinator.placement import search, synthetic
from moehive.coordinator.placement.plan import make_plan
from moehive.coordinator.placement.replan import Migration, replan

EXPERTS, LAYERS, SIZE = 48, 2, 2_000_000


@pytest.fixture(autouse=True)
def short_searches(monkeypatch):
    monkeypatch.setattr(search, "MOVES", 20_000)
    monkeypatch.setattr(search, "FIT_BATCHES", {1: 150, 4: 100, 16: 50, 64: 20})
    monkeypatch.setattr(planning, "SCORE_BATCHES", {1: 400, 4: 250, 16: 120, 64: 50})


def traffic(hour, drifted=0.0):
    return synthetic.trace(LAYERS, EXPERTS, 6, 40, seed=7, drift=np.full(40, drifted).tolist(), draw=hour)


MIGRATION = Migration(bytes_per_s=30e6, horizon_steps=20 * 3600)  # a quarter of 1 Gbit/s; an hour at 20 tokens/s


def test_a_day_of_steady_traffic_moves_nothing_back_and_forth():
    cluster = synthetic.cluster("B", EXPERTS, LAYERS, SIZE, 0.25)
    plan = make_plan(cluster, traffic(0), experts=EXPERTS)
    moved = []
    for hour in range(1, 25):
        decision = replan(plan, traffic(hour), MIGRATION, seed=hour)
        plan = decision.plan
        if decision.adopt:
            moved.append(hour)
    assert len(moved) <= 1  # the first plan knew one hour only


def test_a_change_of_traffic_is_followed_once():
    cluster = synthetic.cluster("B", EXPERTS, LAYERS, SIZE, 0.25)
    plan = make_plan(cluster, traffic(0), experts=EXPERTS)
    decision = replan(plan, traffic(1, drifted=1.0), MIGRATION, seed=1)
    assert decision.adopt and decision.moved_bytes > 0
    assert 2 * decision.break_even_steps < MIGRATION.horizon_steps
    assert "saves" in decision.sentence
    again = replan(decision.plan, traffic(2, drifted=1.0), MIGRATION, seed=2)
    assert not again.adopt and again.plan is decision.plan


def test_a_gain_that_does_not_pay_back_is_left():
    cluster = synthetic.cluster("B", EXPERTS, LAYERS, SIZE, 0.25)
    plan = make_plan(cluster, traffic(0), experts=EXPERTS)
    slow = Migration(bytes_per_s=30e6, service_lost=1.0, horizon_steps=50)
    decision = replan(plan, traffic(1, drifted=1.0), slow, seed=1)
    assert not decision.adopt and "stays" in decision.sentence
