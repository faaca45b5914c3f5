"""Whether what a pack's manifest says is what the model computes whose trunk lies beside it.

The sizes of files can't tell: hidden and intermediate size changed for each other, or another activation, take as
many bytes.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from moehive.kernels.geometry import ExpertSpec

from ...types import CoordinatorError
from ..checkpoint import Checkpoint
from ..gguf.checkpoint import GgufCheckpoint
from .manifest import PackManifest

_FORMATS = ("format", "down_format")  # a pack's own; its files' sizes and fingerprint are held to them


def check_fit(path: Path, pack: PackManifest, trunk: Checkpoint | GgufCheckpoint) -> None:
    """Raises CoordinatorError, one sentence, for a manifest of another model than that of `trunk`.

    `path` is the pack's.
    """
    layers = pack.manifest.layers
    if len(layers) != len(trunk.described):
        raise _misfit(path, "a number of MoE layers", len(layers), len(trunk.described))
    for number, (layer, model) in enumerate(zip(layers, trunk.described, strict=True)):
        wanted = _facts(model.experts, model.top_k, model.layout.spec)
        for name, value in _facts(layer.experts, layer.top_k, layer.spec).items():
            if value != wanted[name]:
                raise _misfit(path, f"the {name} of MoE layer {number}", value, wanted[name])
    if pack.in_place and layers != trunk.manifest.layers:
        raise CoordinatorError(f"{path} names other formats than {pack.source} has; convert that again.")
    shapes = trunk.shapes if isinstance(trunk, Checkpoint) else {}
    for one in pack.matrices:
        if shapes.get(one.name) != (one.rows, one.columns):
            raise CoordinatorError(
                f"{path} holds {one.name} as {one.rows} x {one.columns}, which does not fit its model; convert the "
                "model again."
            )


def _facts(experts: int, top_k: int, spec: ExpertSpec) -> dict[str, Any]:
    own = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name not in _FORMATS}
    return {"experts": experts, "top_k": top_k, **own}


def _misfit(path: Path, what: str, found: Any, wanted: Any) -> CoordinatorError:
    return CoordinatorError(
        f"{path} says {what} is {found!r}, where its model has {wanted!r}; copy the pack again, or convert the model"
        " again."
    )
