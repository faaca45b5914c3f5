"""How many bytes of a checkpoint's trunk one token reads, from the headers of its files alone."""

from collections.abc import Mapping
from pathlib import Path

from ..checkpoints.directory import open_directory
from ..checkpoints.gguf.file import open_gguf


def read_bytes_a_token(model: Path) -> int:
    """Bytes of all tensors but routed experts; of the embedding only when it is the head as well, a row otherwise.

    Raises CoordinatorError when the headers can't be read.
    """
    if model.suffix == ".gguf":
        tensors = open_gguf(model).tensors
        sizes = {name: tensor.stored.nbytes for name, tensor in tensors.items()}
        return _sum(sizes, "_exps.", "token_embd.weight", "output.weight")
    stored = open_directory(model).tensors
    return _sum({name: t.nbytes for name, t in stored.items()}, ".experts.", "embed_tokens.weight", "lm_head.weight")


def _sum(sizes: Mapping[str, int], expert: str, embedding: str, head: str) -> int:
    headed = any(name.endswith(head) for name in sizes)
    return sum(
        nbytes for name, nbytes in sizes.items() if expert not in name and not (headed and name.endswith(embedding))
    )
