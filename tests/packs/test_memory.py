"""A conversion's memory does not follow the model's size: in a process of its own, its peak is within its bound."""

from pathlib import Path

import pytest

from moehive.coordinator.bench.convert import timed_convert
from moehive.coordinator.bench.random_file import random_file
from moehive.coordinator.bench.random_model import RandomModel

WORKERS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 experts of 9 MB, 0.6 GB: with Python and torch, that is more than a conversion may hold."""
    wanted = RandomModel(geometry="qwen3-30b", format="bf16", layers=1, experts=64)
    return random_file(wanted, tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("format", ["keep", "q8_0"])
def test_it_is_two_experts_of_each_worker_and_a_gigabyte(format: str, model: Path, tmp_path: Path) -> None:
    measured = timed_convert(str(model), format, [model], tmp_path, WORKERS)
    limit = 2 * WORKERS * measured["largest_expert_bytes"] + 10**9
    assert measured["start_rss_bytes"] + model.stat().st_size > limit  # so that the bound says something
    assert measured["peak_rss_bytes"] <= limit
