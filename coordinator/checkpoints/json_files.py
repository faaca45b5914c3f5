"""The small JSON files beside a checkpoint's weights: its config, and the index of its shards."""

import json
from pathlib import Path
from typing import Any

from ..types import CoordinatorError

INDEX = "model.safetensors.index.json"
MAX_JSON = 64 << 20  # bytes of a config or an index; those of the largest models have some 10 MB


def read_index(index: Path) -> dict[str, str]:
    """An index file's tensors, each with the file beside it that holds it. Raises CoordinatorError."""
    weight_map = json_object(index, read_bytes(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CoordinatorError(f"{index} has no weight_map; download the checkpoint again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or "\0" in file:
            raise CoordinatorError(
                f"{index} places {_shown(name)} in {_shown(file)}, which is not a file of that directory."
            )
        if not file.endswith(".safetensors"):
            raise CoordinatorError(
                f"{index} places {_shown(name)} in {_shown(file)}, which is not a safetensors file."
            )
    return weight_map


def _shown(value: object) -> str:
    """What a file claims, short enough for a sentence."""
    return repr(value)[:120]


def read_bytes(path: Path) -> bytes:
    """A small file of a model's directory, whole. Raises CoordinatorError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CoordinatorError(f"{path} has {path.stat().st_size} bytes, far too many for such a file.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CoordinatorError(f"{path.parent} has no {path.name}, so it is not a model directory.") from error
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error


def _constant(name: str) -> float:
    """NaN is nothing that a model could be made with; some configs have Infinity, as no limit."""
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)


def json_object(path: Path, data: bytes) -> dict[str, Any]:
    """The object that `data`, the contents of `path`, holds. Raises CoordinatorError."""
    try:
        value = json.loads(data, parse_constant=_constant)
    except (ValueError, RecursionError) as error:
        raise CoordinatorError(f"{path} is not valid JSON: {error}; copy it again.") from error
    if not isinstance(value, dict):
        raise CoordinatorError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value
