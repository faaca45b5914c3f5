"""The models that are on this machine: what each needs, read from headers alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..types import CoordinatorError
from .gguf.file import GgufTensor
from .hub import cache
from .opening import ModelSource, open_model, trunk_of
from .pack.checkpoint import PackCheckpoint, is_pack


@dataclass(frozen=True, slots=True)
class FoundModel:
    """One model. Bytes are as it is computed; `problem` says why it can't be used, and then they are 0.

    `file_bytes` are on the disk, of a pack in place with its source's.
    """

    name: str  # what `--model` takes
    path: Path
    kind: str  # safetensors, GGUF, pack
    file_bytes: int
    expert_bytes: int = 0
    trunk_bytes: int = 0
    formats: tuple[str, ...] = ()  # of the experts, the most frequent first
    problem: str | None = None


def inventory(folders: list[Path]) -> Iterator[FoundModel]:
    """The models of the hub's cache, and those in `folders` or directly below, each as soon as it is looked at."""
    for name, path in _of_the_hub():
        yield look(name, path)
    for folder in folders:
        below = sorted(folder.iterdir()) if folder.is_dir() and not _is_model(folder) else [folder]
        for path in below:
            if _is_model(path) and not _is_later_part(path):
                yield look(str(path), path)


def look(name: str, path: Path) -> FoundModel:
    """What a model needs. Never raises for one that can't be read: `problem` says why."""
    kind = "GGUF" if path.is_file() else "pack" if is_pack(path) else "safetensors"
    size = 0
    try:
        size = _file_bytes(path)
        source = open_model(str(path))
        if isinstance(source, PackCheckpoint) and source.pack.in_place:
            size += _file_bytes(Path(source.pack.source))
    except (CoordinatorError, OSError) as error:
        return FoundModel(name, path, kind, size, problem=str(error))
    return FoundModel(name, path, kind, size, source.manifest.total_bytes, _trunk_bytes(source), _formats(source))


def _file_bytes(path: Path) -> int:
    """Of a GGUF with all its parts, of a directory, or of a pack with what lies below it."""
    if path.is_dir():
        files = list(path.rglob("*") if is_pack(path) else path.iterdir())
    elif (split := path.name.partition("-of-"))[1]:
        files = list(path.parent.glob(f"{split[0][:-5]}*-of-{split[2]}"))
    else:
        files = [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _trunk_bytes(source: ModelSource) -> int:
    stored = trunk_of(source).trunk_stored()
    tensors = stored if isinstance(stored, list) else list(stored.values())
    own = source.pack.matrices if isinstance(source, PackCheckpoint) else ()
    return sum(one.nbytes for one in own) + sum(
        tensor.stored.nbytes if isinstance(tensor, GgufTensor) else tensor.nbytes for tensor in tensors
    )


def _formats(source: ModelSource) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    for layer in source.manifest.layers:
        for spec, experts in Counter(map(layer.spec_of, range(layer.experts))).items():
            for place in spec.tensors:
                if place.name in ("up", "down"):
                    counts[place.format] += place.nbytes * experts
    return tuple(name for name, _ in counts.most_common())


def _of_the_hub() -> Iterator[tuple[str, Path]]:
    found = cache()
    for repository in sorted(found.repos if found is not None else (), key=lambda each: each.repo_id):
        if repository.repo_type != "model" or not repository.revisions:
            continue
        newest = max(repository.revisions, key=lambda revision: revision.last_modified).snapshot_path
        if any(newest.glob("*.safetensors")):
            yield repository.repo_id, newest
        for file in sorted(newest.glob("**/*.gguf")):
            if not _is_later_part(file) and not file.name.startswith(("mmproj", "imatrix")):
                yield f"{repository.repo_id}:{file.name.removesuffix('.gguf').partition('-00001-of-')[0]}", file


def _is_model(path: Path) -> bool:
    try:
        if path.is_file():
            return path.suffix == ".gguf"
        return path.is_dir() and (is_pack(path) or (path / "config.json").exists())
    except OSError:  # a directory that this user may not look into
        return False


def _is_later_part(path: Path) -> bool:
    return "-of-" in path.name and "-00001-of-" not in path.name
