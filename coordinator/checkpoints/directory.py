"""A checkpoint's directory: its config.json, its shards, and a fingerprint of them."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..types import CoordinatorError
from .safetensors_file import StoredTensor, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON = 64 << 20  # bytes of a config or an index; those of the largest models have some 10 MB


@dataclass(frozen=True, slots=True)
class Directory:
    """What a checkpoint's directory holds; tensors are found by the names that the checkpoint gives them."""

    path: Path
    config: dict[str, Any]  # config.json as it is
    tensors: dict[str, StoredTensor]
    fingerprint: str  # 64 hexadecimal digits; see `open_directory`


def open_directory(path: Path) -> Directory:
    """Reads a directory's config and all of its shards' headers, and no weights.

    The fingerprint is SHA-256 over the config, and over each shard's name, header, size and time of last change
    (nanoseconds): it changes whenever a weight may have changed, without reading the weights. Raises
    CoordinatorError, one sentence, for anything missing, unreadable or corrupt.
    """
    try:
        if not path.exists():
            raise CoordinatorError(
                f"There is no model directory {path}; give a directory with config.json and safetensors."
            )
        if not path.is_dir():
            raise CoordinatorError(f"{path} is not a directory; give the directory with config.json and safetensors.")
    except OSError as error:  # a parent that may not be searched, a name too long
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error
    _refuse_links_out(path)
    config_bytes = _read(path / "config.json")
    config = _object(path / "config.json", config_bytes)
    digest = hashlib.sha256(config_bytes)
    tensors: dict[str, StoredTensor] = {}
    wanted = _shards(path)
    for shard, names in wanted.items():
        found, header = read_header(shard)
        absent = sorted(names - found.keys())
        if absent:
            raise CoordinatorError(
                f"{shard} lacks {absent[0]!r}{_more(absent)}, which {INDEX} says it has;"
                " download the checkpoint again."
            )
        tensors |= found
        stat = shard.stat()
        digest.update(f"{shard.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        digest.update(header)
    if not tensors:
        raise CoordinatorError(f"{path} holds no tensors; download the checkpoint again.")
    return Directory(path, config, tensors, digest.hexdigest())


def _refuse_links_out(path: Path) -> None:
    """A directory that was downloaded may hold links to whatever else this user can read: none may lead out of it.

    The hub's cache keeps contents in `blobs` beside its snapshots; links there are its own.
    """
    inside = [path.resolve()]
    if path.resolve().parent.name == "snapshots":
        inside.append(path.resolve().parents[1] / "blobs")
    try:
        links = sorted(entry for entry in path.iterdir() if entry.is_symlink())
        for link in links:
            if not any(link.resolve().is_relative_to(folder) for folder in inside):
                raise CoordinatorError(
                    f"{link} is a link that leads out of the model's directory; put the file itself there."
                )
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error
    except RuntimeError as error:  # links in a circle, as older Pythons say it
        raise CoordinatorError(f"{path} holds links that lead in a circle.") from error


def _shards(path: Path) -> dict[Path, set[str]]:
    """The safetensors files of a directory, each with the tensors that the index expects in it."""
    index = path / INDEX
    if not index.exists():
        single = path / SINGLE
        if single.exists():
            return {single: set()}
        others = sorted(path.glob("*.safetensors"))
        if len(others) == 1:
            return {others[0]: set()}
        if others:
            raise CoordinatorError(
                f"{path} has {len(others)} safetensors files but no {INDEX}; download the checkpoint again."
            )
        pickles = sorted(file for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise CoordinatorError(
                f"{path} holds weights only as pickle ({pickles[0].name}), which can run code and is refused;"
                " convert the checkpoint to safetensors."
            )
        raise CoordinatorError(f"{path} has neither {SINGLE} nor {INDEX}; download the checkpoint again.")
    shards: dict[Path, set[str]] = {}
    for name, file in read_index(index).items():
        shards.setdefault(path / file, set()).add(name)
    missing = sorted(shard.name for shard in shards if not shard.exists())
    if missing:
        raise CoordinatorError(
            f"{path} lacks {missing[0]}{_more(missing)} of its {len(shards)} shards; finish the copy or the download."
        )
    return dict(sorted(shards.items()))


def read_index(index: Path) -> dict[str, str]:
    """An index file's tensors, each with the file beside it that holds it. Raises CoordinatorError."""
    weight_map = _object(index, _read(index)).get("weight_map")
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


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_JSON:
            raise CoordinatorError(f"{path} has {path.stat().st_size} bytes, far too many for such a file.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CoordinatorError(f"{path.parent} has no {path.name}, so it is not a model directory.") from error
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error


def _object(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CoordinatorError(f"{path} is not valid JSON: {error}; copy it again.") from error
    if not isinstance(value, dict):
        raise CoordinatorError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _more(names: list[str]) -> str:
    return "" if len(names) == 1 else f" and {len(names) - 1} more"
