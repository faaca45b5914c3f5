"""How many bytes of a checkpoint's trunk one token reads: weights, from the files' headers, and recurrent state."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.directory import open_directory
from ..checkpoints.gguf.file import open_gguf
from ..estimate.model import LATENT_NAMES
from ..models.base import Trunk
from ..models.lean.cache import SequenceCache


class _Tensor(NamedTuple):
    name: str
    numbers: int
    nbytes: int


def read_bytes_a_token(model: Path) -> int:
    """Bytes of all tensors but routed experts; of the embedding only when it is the head as well, a row otherwise.

    Raises CoordinatorError when the headers can't be read.
    """
    if model.suffix == ".gguf":
        stored = open_gguf(model).tensors
        found = [_Tensor(name, math.prod(one.shape), one.stored.nbytes) for name, one in stored.items()]
        return _sum(found, "_exps.", "token_embd.weight", "output.weight")
    tensors = open_directory(model).tensors
    found = [_Tensor(name, math.prod(one.shape), one.nbytes) for name, one in tensors.items()]
    return _sum(found, ".experts.", "embed_tokens.weight", "lm_head.weight")


def state_bytes(trunk: Trunk) -> int:
    """Bytes of a sequence's recurrent state, which each of its tokens reads; 0 of a trunk that is not lean."""
    cache = trunk.new_cache()
    total = cache_bytes_of(cache)  # which has no tokens yet
    trunk.free_cache(cache)
    return total


def cache_bytes_of(cache: object) -> int:
    """Bytes of a sequence's recurrent state and of its cached tokens, of which a window sees the newest.

    0 of a trunk that is not lean.
    """
    if not isinstance(cache, SequenceCache):
        return 0
    return sum(state.nbytes for state in cache.states) + sum(table.nbytes for table in cache.tables)


def _sum(tensors: Iterable[_Tensor], expert: str, embedding: str, head: str) -> int:
    trunk = [one for one in tensors if expert not in one.name]
    headed = any(one.name.endswith(head) for one in trunk)
    in_f32 = any(one.name.endswith(embedding) and one.nbytes == 4 * one.numbers for one in trunk)
    total = 0
    for one in trunk:
        if any(name in one.name for name in LATENT_NAMES):  # in 32 bits where the checkpoint is in f32
            total += one.numbers * (4 if in_f32 else 2)
        elif not (headed and one.name.endswith(embedding)):
            total += one.nbytes
    return total
