"""What transformers' model says about a checkpoint, as plain data that can be kept.

Finding it takes transformers' model classes, whose import takes longer than everything else that a coordinator does
before it serves. So a coordinator keeps it (`Outlines`), and opens the same checkpoint without them the next time.
"""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import msgpack
import torch
import zstandard

from moehive.kernels.geometry import ExpertSpec

from ..whole_file import whole_file
from .experts import ExpertLayout, NormLayout
from .recipe import Recipe

log = logging.getLogger(__name__)

VERSION = 2  # of what is kept; raise it when the same checkpoint would give another outline
MAX_BYTES = 256 << 20
KEPT = 16  # models

_Kept = TypeVar("_Kept")


@dataclass(frozen=True, slots=True)
class ParameterOutline:
    """One fused parameter of a layer's experts, and the names of the tensors that make it up, pattern by pattern."""

    name: str  # in transformers' model
    shape: tuple[int, ...]  # [experts, ...]; of a norm [hidden]
    dtype: torch.dtype
    recipe: Recipe | None  # of one expert; None: only transformers converts it, a layer at a time
    tensors: dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class ExpertsOutline:
    """One layer's routed experts. `parameters` are by their names in the experts module.

    There are none in a GGUF, and in the trunk of a pack, whose experts lie elsewhere.
    """

    name: str  # of the module
    experts: int
    top_k: int
    layout: ExpertLayout
    parameters: dict[str, ParameterOutline] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outline:
    """A directory of safetensors. Names on the left are transformers', on the right the checkpoint's."""

    layers: tuple[ExpertsOutline, ...]
    shapes: dict[str, tuple[int, ...]]  # of the model's parameters
    trunk_bytes: int  # that the trunk takes in memory, in the checkpoint's dtype
    plain: dict[str, str]  # the trunk's tensors that are only renamed
    trunk: tuple[str, ...]  # the checkpoint's tensors that belong to no expert
    unused: tuple[str, ...]  # those of them that belong to nothing


def pack_outline(outline: Outline) -> dict[str, Any]:
    """For msgpack."""
    return {
        "layers": pack_layers(outline.layers),
        "shapes": outline.shapes,
        "trunk_bytes": outline.trunk_bytes,
        "plain": outline.plain,
        "trunk": outline.trunk,
        "unused": outline.unused,
    }


def unpack_outline(packed: dict[str, Any]) -> Outline:
    """What `pack_outline` was given."""
    return Outline(
        unpack_layers(packed["layers"]),
        {name: tuple(shape) for name, shape in packed["shapes"].items()},
        packed["trunk_bytes"],
        packed["plain"],
        tuple(packed["trunk"]),
        tuple(packed["unused"]),
    )


def pack_layers(layers: tuple[ExpertsOutline, ...]) -> list[Any]:
    """For msgpack."""
    return [
        {
            "name": layer.name,
            "experts": layer.experts,
            "top_k": layer.top_k,
            "layout": asdict(layer.layout),
            "parameters": {
                short: [one.name, one.shape, str(one.dtype).removeprefix("torch."), one.recipe, one.tensors]
                for short, one in layer.parameters.items()
            },
        }
        for layer in layers
    ]


def unpack_layers(packed: list[Any]) -> tuple[ExpertsOutline, ...]:
    """What `pack_layers` was given."""
    return tuple(
        ExpertsOutline(
            layer["name"],
            layer["experts"],
            layer["top_k"],
            _layout(layer["layout"]),
            {
                short: ParameterOutline(name, tuple(shape), getattr(torch, dtype), _recipe(recipe), tensors)
                for short, (name, shape, dtype, recipe, tensors) in layer["parameters"].items()
            },
        )
        for layer in packed
    )


class Outlines:
    """Outlines in a directory, each in a file of its own under the fingerprint of what it is of."""

    def __init__(self, folder: Path) -> None:
        """The directory is made when the first outline is kept."""
        self._folder = folder

    def find(self, fingerprint: str, kind: str, unpack: Callable[[Any], _Kept]) -> _Kept | None:
        """What was kept; None if nothing was, or by another version, or if it can't be read."""
        try:
            with self._file(fingerprint, kind).open("rb") as file:
                data = file.read(MAX_BYTES)
            body = zstandard.ZstdDecompressor().decompress(data, max_output_size=MAX_BYTES)
            return unpack(msgpack.unpackb(body, max_bin_len=MAX_BYTES, max_str_len=4096))
        except FileNotFoundError:
            return None
        except Exception as error:  # a file of any content: it is made anew
            log.info("What is kept of the model can't be used, and is found out anew: %s", error)
            return None

    def keep(self, fingerprint: str, kind: str, packed: Any) -> None:
        """Where that fails nothing is kept, and the next start takes longer."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(self._file(fingerprint, kind)) as file:
                file.write(zstandard.ZstdCompressor(3).compress(cast(bytes, msgpack.packb(packed))))
            kept = sorted(self._folder.glob("*.msgpack"), key=lambda file: file.stat().st_mtime_ns)
            for old in kept[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            log.info("What is known of the model can't be kept in %s: %s", self._folder, error.strerror)

    def _file(self, fingerprint: str, kind: str) -> Path:
        """Of one checkpoint as these versions of the two libraries see it."""
        versions = f"{VERSION} {version('moehive')} {version('transformers')} {torch.__version__}"
        digest = hashlib.sha256(f"{fingerprint} {kind} {versions}".encode()).hexdigest()
        return self._folder / f"{digest}.msgpack"


def _layout(packed: dict[str, Any]) -> ExpertLayout:
    norm = packed["norm"]
    return ExpertLayout(
        ExpertSpec(**packed["spec"]),
        tuple(packed["names"]),
        packed["transposed"],
        packed["interleaved"],
        None if norm is None else NormLayout(**norm),
    )


def _recipe(packed: list[list[Any]] | None) -> Recipe | None:
    return None if packed is None else tuple(tuple(step) for step in packed)
