"""The tokenizer and chat template in a checkpoint's directory, as transformers reads them; it may have neither."""

from pathlib import Path
from typing import Any

from ..types import CoordinatorError
from .json_files import json_object, read_bytes

_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "*.tiktoken")


def load_tokenizer(directory: Path) -> tuple[Any, frozenset[int]]:
    """transformers' tokenizer, None when the directory has none, and the ids that end a text.

    Raises CoordinatorError when it can't be read.
    """
    stop_tokens = end_tokens(directory)
    if not any(found for pattern in _FILES for found in directory.glob(pattern)):
        return None, stop_tokens
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True), stop_tokens
    except Exception as error:  # transformers raises whatever a broken file leads it to
        raise CoordinatorError(
            f"The tokenizer in {directory} can't be read ({type(error).__name__}: {error}); get the checkpoint "
            "again, or remove the tokenizer's files to serve token ids only."
        ) from error


def end_tokens(directory: Path) -> frozenset[int]:
    """The ids that end a text: generation_config.json's, else config.json's (for the text part, if it has one).

    Raises CoordinatorError when one of them can't be read.
    """
    path = directory / "config.json"
    config = _json(path)
    generation = directory / "generation_config.json"
    for source, where in ((_json(generation), generation), (config, path), (config.get("text_config"), path)):
        ids = source.get("eos_token_id") if isinstance(source, dict) else None
        if ids is None:
            continue
        ids = ids if isinstance(ids, list) else [ids]
        if any(type(one) is not int for one in ids):
            raise CoordinatorError(f"{where} says eos_token_id = {str(ids)[:60]}, no token's id; download it again.")
        return frozenset(ids)
    return frozenset()


def _json(path: Path) -> dict[str, Any]:
    return json_object(path, read_bytes(path)) if path.exists() else {}
