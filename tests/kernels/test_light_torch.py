"""torch without the shapes of its operations: in processes of their own, for what is imported there stays so."""

import subprocess
import sys

COMPUTES = """
import sys
from moehive.kernels.light_torch import import_torch
import_torch()
import moehive.expert_node.node
heavy = ("torch._meta_registrations", "torch._decomp", "torch._dynamo", "sympy", "transformers", "fastapi", "triton")
print(*(name for name in heavy if name in sys.modules))
"""
LATER = """
from moehive.kernels.light_torch import import_torch
import_torch()
import torch
import torch._meta_registrations
import_torch()
assert torch._meta_registrations.meta_index_Tensor
a, b = (torch.empty(size, device="meta", dtype=torch.bfloat16) for size in ((3, 5), (5, 2)))
assert (a @ b).shape == (3, 2)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_node_needs_neither_the_compiler_nor_its_shapes() -> None:
    assert run(COMPUTES).split() == []


def test_whoever_needs_the_shapes_later_has_them() -> None:
    run(LATER)
