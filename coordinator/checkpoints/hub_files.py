"""Which files of a repository a model needs: one set of weights, its config, its tokenizer, and nothing else."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..types import CoordinatorError
from .json_files import INDEX, read_index

# Where repositories keep further copies of a model, in layouts that are not read (gpt-oss: 14 GB each).
OWN_LAYOUTS = ("original", "metal")
# Beside the weights; pickles, other frameworks' weights, pictures and documents stay away.
_BESIDE = ("*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "vocab.txt", "*.tiktoken")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPLIT = re.compile(r"-\d{5}-of-\d{5}$")
_MAX_BESIDE = 256 << 20  # bytes of a config or a tokenizer
_SHOWN = 8  # choices named in an error


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository; only large ones have a SHA-256."""

    name: str
    size: int  # bytes
    sha256: str | None

    def __post_init__(self) -> None:
        """Raises CoordinatorError for what is no SHA-256: a file of the cache is named by it."""
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise CoordinatorError(f"The hub names no SHA-256 for {self.name}; nothing of it is downloaded.")


def needed_files(model: str, files: list[HubFile], choice: str | None, fetch: Callable[[str], Path]) -> list[HubFile]:
    """What to download; `fetch` gets one small file now. Raises CoordinatorError for what can't be chosen."""
    by_name = {file.name: file for file in files}
    top = [file for file in files if "/" not in file.name]
    beside = [file for file in top if any(fnmatch(file.name, p) for p in _BESIDE) and file.size <= _MAX_BESIDE]
    weights = [
        file for file in top if file.name.endswith(".safetensors") and not file.name.startswith("consolidated")
    ]
    if choice is None and weights and "config.json" in by_name:
        if INDEX in by_name:
            wanted = set(read_index(fetch(INDEX)).values())
            if gone := sorted(wanted - by_name.keys()):
                raise CoordinatorError(f"{model} lacks {gone[0]} on the hub, which its index names.")
            weights = [file for file in weights if file.name in wanted]
        return [*beside, *weights]
    models = _gguf_models([file.name for file in files])
    if models:
        return [by_name[name] for name in _choose(model, models, choice)]
    if any(file.name.endswith((".bin", ".pt", ".pth")) for file in top):
        raise CoordinatorError(f"{model} has its weights only as pickle, which can run code and is refused.")
    own = next((file.name for file in files if file.name.startswith(tuple(f"{f}/model" for f in OWN_LAYOUTS))), None)
    if own is not None:
        raise CoordinatorError(
            f"{model} has its weights only as {own}, in their publisher's own layout, which is not read; choose a"
            " repository with config.json and model.safetensors at its top."
        )
    if choice is not None and weights:
        raise CoordinatorError(f"{model} holds safetensors and no GGUF models to choose from; write {model}.")
    raise CoordinatorError(f"{model} holds no model in safetensors or GGUF.")


def chosen_path(folder: Path, model: str, choice: str | None) -> Path:
    """In a downloaded snapshot, the directory of safetensors, or the first part of the chosen GGUF."""
    if choice is None and any(folder.glob("*.safetensors")):
        return folder
    names = [path.relative_to(folder).as_posix() for path in folder.glob("**/*.gguf")]
    if not names:
        return folder  # whoever opens it says what is missing
    return folder / sorted(_choose(model, _gguf_models(names), choice))[0]


def _gguf_models(names: list[str]) -> dict[str, list[str]]:
    """The GGUF models among files, by name without number of a part; helpers for images or quantizing are none."""
    models: dict[str, list[str]] = {}
    for name in names:
        last = name.rpartition("/")[2]
        if name.endswith(".gguf") and not last.startswith(("mmproj", "imatrix")) and name.count("/") <= 1:
            models.setdefault(_SPLIT.sub("", name.removesuffix(".gguf")), []).append(name)
    return models


def _choose(model: str, models: dict[str, list[str]], choice: str | None) -> list[str]:
    found = sorted(models)
    if choice is not None:
        wanted = choice.lower()
        found = [name for name in found if _means(name.lower(), wanted)]
    if len(found) == 1:
        return sorted(models[found[0]])
    names = [_quantization(name) for name in (found or sorted(models))]
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    if not found:
        raise CoordinatorError(f"{model} has no GGUF model {choice!r}; it has {shown}.")
    raise CoordinatorError(f"{model} has {len(found)} GGUF models; choose one, as in {model}:{names[0]} ({shown}).")


def _means(name: str, wanted: str) -> bool:
    folder, _, last = name.rpartition("/")
    return folder == wanted or last == wanted or last.endswith((f"-{wanted}", f".{wanted}"))


def _quantization(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return folder or re.split(r"[-.](?=(?:UD-)?(?:I?Q\d|BF16|F16|F32|MXFP4|TQ\d))", last)[-1]
