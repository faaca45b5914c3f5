"""A layer's routing, split by node: which tokens go where, with which experts and weights."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from moehive.proto.tensors import Routing

from .native import address, library


class Share(NamedTuple):
    """One node's part of a layer."""

    tokens: npt.NDArray[np.int64]  # [rows]: which of the layer's tokens, ascending
    pairs: npt.NDArray[np.int64]  # [pairs]: where each pair stands in the layer's flat [tokens * k]
    routing: Routing  # offsets over `tokens`
    message: memoryview  # `routing` as the fields of a ComputeRequest


Owner: TypeAlias = npt.NDArray[np.int64]  # [experts]: a node's index for each, -1: none


def split(ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], owner: Owner) -> dict[int, Share]:
    """Splits `ids` and `weights` [tokens, k] by `owner`, in native code (cpp/dispatch.cc).

    `owner` lies in one piece. Ids outside the experts mean none (some families pad their top-k). Nodes come in
    ascending order, tokens and pairs in theirs: the same input gives the same messages. The shares' arrays are parts
    of one.
    """
    tokens, k = ids.shape
    ids, weights = np.ascontiguousarray(ids), np.ascontiguousarray(weights)
    count, experts = ids.size, len(owner)
    block = np.empty(block_size(count, experts), dtype=np.int64)
    found = library().moehive_split(
        address(ids), address(weights), tokens, k, address(owner), experts, address(block)
    )
    if found < 0:
        raise MemoryError("There is no memory left to split a layer.")
    return shares_of(block, count, experts, found)


def block_size(count: int, experts: int) -> int:
    """Numbers that moehive_split may write of `count` pairs."""
    return 5 * count + 8 * min(count, experts) + 1


def shares_of(block: npt.NDArray[np.int64], count: int, experts: int, found: int) -> dict[int, Share]:
    """What moehive_split has written of `count` pairs over so many `experts`: `found` nodes' shares."""
    heads_at, numbers_at = 2 * count, 2 * count + 4 * min(count, experts)
    heads = block[heads_at : heads_at + 4 * found].tolist()
    narrow = block[numbers_at:].view(np.uint32)
    shares: dict[int, Share] = {}
    pair = row = 0
    first = 2 * count  # of the offsets
    messages = narrow.data.cast("B")[4 * (first + sum(heads[2::4]) + found) :]
    for at in range(0, 4 * found, 4):
        end, last, after = pair + heads[at + 1], row + heads[at + 2], first + heads[at + 2] + 1
        factors = narrow[count + pair : count + end].view(np.float32)
        shares[heads[at]] = Share(
            block[count + row : count + last],
            block[pair:end],
            Routing(narrow[first:after], narrow[pair:end], factors),
            messages[: heads[at + 3]],
        )
        messages = messages[heads[at + 3] :]
        pair, row, first = end, last, after
    return shares


def only(ids: npt.NDArray[np.int64], shares: Sequence[Share]) -> npt.NDArray[np.int64]:
    """`ids` [tokens, k] with none (-1) in place of all pairs that are in no share."""
    kept = np.full(ids.shape, -1, dtype=ids.dtype)  # in rows, however `ids` lies in memory
    for share in shares:
        kept.reshape(-1)[share.pairs] = ids.reshape(-1)[share.pairs]
    return kept


def pieces(
    ids: npt.NDArray[np.int64], weights: npt.NDArray[np.float32], share: Share, experts: int
) -> Iterator[Share]:
    """`share`, a part of `ids` and `weights`, in shares of at most `experts` experts each."""
    mine = only(ids, [share])
    numbers = np.unique(mine[mine >= 0])
    for start in range(0, len(numbers), experts):
        piece = np.where(np.isin(mine, numbers[start : start + experts]), mine, -1)
        yield split(piece, weights, np.zeros(int(numbers[-1]) + 1, dtype=np.int64))[0]
