"""A plan as dispatch looks at it: for each layer, who of those that can be asked now holds which expert."""

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from ..types import NodeName, Plan
from .replicas import Holders

LOST = -1  # in place of a node's index: nobody who holds the expert can be asked


class Placed:
    """One plan. `use` names the nodes that can be asked; before the first call nobody can."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = tuple(sorted({node for layer in plan.owners for nodes in layer for node in nodes}))
        index = {name: i for i, name in enumerate(self.names)}
        self._holders: list[npt.NDArray[np.int32]] = []  # [experts, most holders], filled up with LOST
        for layer in plan.owners:
            most = max(1, max(map(len, layer), default=1))
            rows = [[index[n] for n in nodes] + [LOST] * (most - len(nodes)) for nodes in layer]
            self._holders.append(np.array(rows, dtype=np.int32).reshape(len(layer), most))
        self.owners: list[npt.NDArray[np.int64]] = []  # for each layer, the first holder of each expert, or LOST
        self.has_choice: list[bool] = []  # whether any expert of the layer has more than one holder
        self._asked: list[Holders | None] = []
        self._alive = np.zeros(len(self.names) + 1, dtype=np.bool_)  # the last is LOST's
        self.lost = 0  # experts that nobody can be asked for
        self.use(())

    def use(self, live: Collection[NodeName]) -> None:
        """From now on `live` are asked, and nobody else."""
        self._alive[:-1] = [name in live for name in self.names]
        self.owners, self.has_choice, self.lost = [], [], 0
        self._asked = [None] * len(self._holders)
        for holders in self._holders:
            there = self._alive[holders]
            first = there.argmax(axis=1)
            rows = np.arange(len(holders))
            owner = np.where(there[rows, first], holders[rows, first], LOST).astype(np.int64)
            self.owners.append(owner)
            self.has_choice.append(bool((there.sum(axis=1) > 1).any()))
            self.lost += int((owner == LOST).sum())

    def holders(self, layer: int) -> Holders:
        """Those that can be asked for each expert of a layer."""
        known = self._asked[layer]
        if known is None:
            known = self._asked[layer] = Holders(_those(self._holders[layer], self._alive), len(self.names))
        return known

    def lost_experts(self, layer: int) -> list[int]:
        """The experts of a layer that nobody can be asked for."""
        return np.flatnonzero(self.owners[layer] == LOST).tolist()

    def owners_but(self, layer: int, avoid: Collection[NodeName]) -> npt.NDArray[np.int64]:
        """For each expert of a layer [experts] a holder that is not among `avoid`, or LOST."""
        asked = self._alive.copy()
        asked[:-1] &= [name not in avoid for name in self.names]
        return _those(self._holders[layer], asked)[:, 0].astype(np.int64)

    def held_without(self, layer: int, experts: npt.NDArray[np.uint32], avoid: Collection[NodeName]) -> bool:
        """Whether each of `experts` can be asked for, of others than `avoid`."""
        owners = self.owners_but(layer, avoid)
        return all(owners[expert] != LOST for expert in set(experts.tolist()))


def _those(holders: npt.NDArray[np.int32], wanted: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    """`holders` [experts, most] with those that are not `wanted` [nodes + 1] left out, filled up with LOST."""
    there = wanted[holders]
    order = np.argsort(~there, axis=1, kind="stable")
    return np.where(np.take_along_axis(there, order, 1), np.take_along_axis(holders, order, 1), np.int32(LOST))
