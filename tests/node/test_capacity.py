"""What a node gives by default: head-room is left."""

import shutil
from collections import namedtuple
from pathlib import Path

import torch

from moehive.expert_node import node
from moehive.expert_node.settings import Settings
from moehive.expert_node.tiers import capacity
from moehive.kernels.ops import ExpertOps

Usage = namedtuple("Usage", "total used free")


def test_memory_default_leaves_head_room():
    assert capacity.memory_for_experts(64 << 30) == (64 << 30) - (64 << 30) // 10
    assert capacity.memory_for_experts(4 << 30) == 3 << 30
    assert capacity.memory_for_experts(1 << 29) == 0


def test_disk_counts_what_the_cache_has(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return Usage(100_000, 90_000, 10_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    folder = tmp_path / "state/cache"
    assert capacity.disk_for_experts(folder) == 8_000  # not made yet
    (folder / "model").mkdir(parents=True)
    (folder / "model/0-1.00ff.expert").write_bytes(bytes(3_000))
    (folder / "model/0-2.00ff.expert").write_bytes(bytes(2_000))
    (folder / "model/0-3.part").write_bytes(bytes(500))
    assert capacity.disk_for_experts(folder) == 12_000
    assert asked == [tmp_path, folder]


def test_a_gpu_keeps_a_tenth_of_what_is_free(monkeypatch):
    from moehive.expert_node.tiers.gpu import free_bytes  # imports Triton

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20_000, 24_000))
    assert free_bytes(torch.device("cuda")) == 18_000


def test_a_node_whose_gpu_fails_at_once_goes_on_without(monkeypatch, caplog):
    def fail(device):
        raise torch.AcceleratorError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert node._gpu(Settings(state=Path("s"), threads=1), ExpertOps(1)) is None
    (said,) = caplog.messages
    assert said == (
        "This node computes on the CPU; its GPU can't be used: AcceleratorError: CUDA error: no kernel image is "
        "available for execution on the device."
    )
