"""Recipes beside transformers' own converters; what is kept of a model, used again, damaged, and not writable."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.gguf.checkpoint import GgufCheckpoint
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.outline import Outlines
from moehive.coordinator.checkpoints.recipe import Recipe, apply, shape_of
from moehive.kernels.geometry import ExpertId

from . import gguf_writer as writer

TinyMoe = Callable[[str], Path]
EXPERTS = 3
# A recipe for one expert, transformers' operations for all of them, and whether a tensor holds one expert.
CHAINS: list[tuple[Recipe, list[ConversionOps], bool]] = [
    ((("stack",),), [MergeModulelist(dim=0)], True),
    ((("stack",), ("concatenate", 1)), [MergeModulelist(dim=0), Concatenate(dim=1)], True),
    ((("stack",), ("concatenate", 2)), [MergeModulelist(dim=0), Concatenate(dim=2)], True),
    ((("stack",), ("transpose", 1, 2)), [MergeModulelist(dim=0), Transpose(1, 2)], True),
    ((("concatenate", 1), ("transpose", 1, 2)), [Concatenate(dim=1), Transpose(1, 2)], False),
    ((("transpose", 1, 2),), [Transpose(1, 2)], False),
    ((("interleave", 1, False),), [Interleave(dim=1)], False),
    ((("interleave", 2, True),), [Interleave(dim=2, inverse=True)], False),
    ((("interleave", 1, False), ("chunk", 1, 2, 1)), [Interleave(dim=1), Chunk(dim=1)], False),
    ((("chunk", 2, 2, 0),), [Chunk(dim=2)], False),
]


@pytest.mark.parametrize(("recipe", "operations", "alone"), CHAINS)
@settings(max_examples=10)
@given(rows=st.integers(1, 4), columns=st.integers(1, 4), seed=st.integers(0, 1000))
def test_a_recipe_is_transformers_conversion_of_one_expert(
    recipe: Recipe, operations: list[ConversionOps], alone: bool, rows: int, columns: int, seed: int
) -> None:
    torch.manual_seed(seed)
    patterns = 2 if any(step[0] == "concatenate" for step in recipe) else 1
    stored = [torch.randn(EXPERTS, 2 * rows, 2 * columns) for _ in range(patterns)]
    sources = [f"experts.source{number}" for number in range(patterns)]
    targets = [f"experts.target{number}" for number in range(2 if recipe[-1][0] == "chunk" else 1)]
    which = recipe[-1][3] if recipe[-1][0] == "chunk" else 0
    converter: Any = deepcopy(WeightConverter(sources, targets, operations=operations))
    converter.collected_tensors.update(
        {name: list(tensor) if alone else [tensor] for name, tensor in zip(sources, stored, strict=True)}
    )
    whole = converter.convert(targets[0])[targets[which]]
    for expert in range(EXPERTS):
        parts = [tensor[expert] if alone else tensor[expert : expert + 1] for tensor in stored]
        found = apply(recipe, parts)
        assert torch.equal(found, whole[expert : expert + 1])
        assert shape_of(recipe, [tuple(part.shape) for part in parts]) == found.shape


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ((("concatenate", 1),), [(1, 4, 2), (1, 4, 3)]),
        ((("concatenate", 3),), [(1, 4, 2)]),
        ((("transpose", 1, 2),), [(1, 4)]),
        ((("transpose", 1, 2),), [(1, 4, 2), (1, 4, 2)]),
        ((("interleave", 1, False),), [(1, 3, 2)]),
        ((("chunk", 1, 2, 0),), [(1, 3, 2)]),
        ((), [(1, 2), (1, 2)]),
    ],
)
def test_tensors_that_do_not_fit_are_refused(recipe: Recipe, sizes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"shape|given"):
        shape_of(recipe, sizes)


def experts_of(source: Any) -> list[bytes]:
    return [
        source.expert_blob(ExpertId(layer, expert)).numpy().tobytes()
        for layer, geometry in enumerate(source.manifest.layers)
        for expert in range(geometry.experts)
    ]


# Experts as single tensors, as stacks, with biases, with a norm; and one that only transformers converts.
@pytest.mark.parametrize(
    "family", ["mixtral", "aria_text", "gpt_oss", "muse_spark", "qwen3_5_moe", "ernie4_5_vl_moe"]
)
def test_what_is_kept_opens_the_same_checkpoint(tiny_moe: TinyMoe, family: str, tmp_path: Path) -> None:
    folder, outlines = tiny_moe(family), Outlines(tmp_path)
    plain, first, second = (Checkpoint.open(folder, outlines=given) for given in (None, outlines, outlines))
    assert len(list(tmp_path.glob("*"))) == (0 if family == "ernie4_5_vl_moe" else 1)
    for opened in (first, second):
        assert opened.manifest == plain.manifest
        assert opened.shapes == plain.shapes
        assert opened.trunk_bytes == plain.trunk_bytes
        assert opened.family == plain.family
        assert opened.trunk_stored() == plain.trunk_stored()
        assert opened.trunk_tensors().plain_matrices() == plain.trunk_tensors().plain_matrices()
        assert experts_of(opened) == experts_of(plain)


def test_a_gguf_too(tiny_moe: TinyMoe, tmp_path: Path) -> None:
    outlines = Outlines(tmp_path / "outlines")
    model = AutoModelForCausalLM.from_pretrained(tiny_moe("qwen3_moe"))
    writer.write(model, model.config, tmp_path / "x.gguf")
    opened = [GgufCheckpoint.open(tmp_path / "x.gguf", outlines=outlines) for _ in range(2)]
    assert opened[0].manifest == opened[1].manifest
    assert experts_of(opened[0]) == experts_of(opened[1])


def test_the_second_opening_needs_no_models_of_transformers(tiny_moe: TinyMoe, tmp_path: Path) -> None:
    Checkpoint.open(tiny_moe("qwen3_moe"), outlines=Outlines(tmp_path))
    code = (
        "import sys; from pathlib import Path; from moehive.coordinator.checkpoints.opening import open_model;"
        "from moehive.coordinator.checkpoints.outline import Outlines;"
        "from moehive.coordinator.trunk import load_trunk;"
        "from moehive.kernels.geometry import ExpertId;"
        "source = open_model(sys.argv[1], Outlines(Path(sys.argv[2]))); load_trunk(source, 1);"
        "source.expert_blob(ExpertId(0, 1));"
        "print(*(name for name in ('transformers.modeling_utils', 'torch._dynamo', 'sympy') if name in sys.modules))"
    )
    given = [str(tiny_moe("qwen3_moe")), str(tmp_path)]
    found = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == []


@pytest.mark.parametrize("damage", [b"", b"no zstd", None])
def test_a_damaged_outline_is_made_anew(tiny_moe: TinyMoe, tmp_path: Path, damage: bytes | None) -> None:
    expected = open_model(str(tiny_moe("mixtral")), Outlines(tmp_path)).manifest
    (kept,) = tmp_path.glob("*")
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    assert open_model(str(tiny_moe("mixtral")), Outlines(tmp_path)).manifest == expected
    assert kept.read_bytes() == whole


def test_a_changed_checkpoint_has_another_outline(tiny_moe: TinyMoe, tmp_path: Path) -> None:
    for family in ("mixtral", "qwen3_moe", "mixtral"):
        Checkpoint.open(tiny_moe(family), outlines=Outlines(tmp_path))
    assert len(list(tmp_path.glob("*"))) == 2


def test_where_nothing_can_be_kept_the_model_opens_all_the_same(tiny_moe: TinyMoe, tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # where a folder would have to be
    Checkpoint.open(tiny_moe("mixtral"), outlines=Outlines(tmp_path / "file"))
