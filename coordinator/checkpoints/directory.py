"""A checkpoint's directory: its config.json, its shards, and a fingerprint of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..regular_file import check_regular
from ..types import CoordinatorError
from .hub_files import OWN_LAYOUTS
from .json_files import INDEX, json_object, read_bytes, read_index
from .links import refuse_links_out
from .safetensors_file import StoredTensor, read_header

SINGLE = "model.safetensors"
_OWN_NAMES = "block.0.mlp.mlp1_weight.blocks"  # of gpt-oss in original/: OpenAI's gpt_oss/torch/weights.py


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
    _check_entries(path)
    _refuse_own_layout(path)
    _refuse_ggufs(path)
    config_bytes = read_bytes(path / "config.json")
    config = json_object(path / "config.json", config_bytes)
    digest = hashlib.sha256(config_bytes)
    tensors: dict[str, StoredTensor] = {}
    for shard, names in _shards(path).items():
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
    if _OWN_NAMES in tensors:
        raise _own_layout(path, "original")
    return Directory(path, config, tensors, digest.hexdigest())


def _check_entries(path: Path) -> None:
    """No link leads out of the directory, and nothing in it is a pipe or a device.

    The hub's cache keeps contents in `blobs` beside its snapshots; links there are its own.
    """
    inside = [path]
    if path.resolve().parent.name == "snapshots":
        inside.append(path.resolve().parents[1] / "blobs")
    try:
        entries = sorted(path.iterdir())
        refuse_links_out([entry for entry in entries if entry.is_symlink()], inside, "the model's directory")
        for entry in entries:  # transformers' own readers open what they know, too
            if entry.exists():
                check_regular(entry)
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error


def _refuse_own_layout(path: Path) -> None:
    """A download of original/ or metal/ alone, or one of these folders itself, is told apart from a broken one."""
    try:
        if any(path.glob("*.safetensors")):
            return
        if (path / "model.bin").exists() and not (path / "config.json").exists():
            raise _own_layout(path, "metal")
        for folder in OWN_LAYOUTS:
            if any((path / folder).glob("model*")):
                raise _own_layout(path, folder)
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}.") from error


def _refuse_ggufs(path: Path) -> None:
    """A folder of GGUFs alone may hold several models, so a file is to be named."""
    ggufs = sorted(path.glob("*.gguf"))
    if ggufs and not any(path.glob("*.safetensors")):
        raise CoordinatorError(f"{path} holds GGUF files; name the file of the model, as {ggufs[0]}.")


def _own_layout(path: Path, folder: str) -> CoordinatorError:
    return CoordinatorError(
        f"{path} holds only the copy of the model that repositories keep in {folder}/, in its publisher's own layout,"
        " which is not read; get the files at the top of its repository, as `moehive pull ORGANIZATION/NAME` does."
    )


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


def _more(names: list[str]) -> str:
    return "" if len(names) == 1 else f" and {len(names) - 1} more"
