"""A plan as dispatch looks at it: for each layer, who of those that can be asked now holds which expert."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from ..types import NodeName, Plan

LOST = -1  # in place of a node's index: nobody who holds the expert can be asked


class Placed:
    """One plan. `use` names the nodes that can be asked; before the first call nobody can."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = tuple(sorted({node for layer in plan.owners for nodes in layer for node in nodes}))
        index = {name: i for i, name in enumerate(self.names)}
        self._holders: list[npt.NDArray[np.int64]] = []  # [experts, most holders], filled up with LOST
        for layer in plan.owners:
            most = max(map(len, layer), default=1)
            rows = [[index[n] for n in nodes] + [LOST] * (most - len(nodes)) for nodes in layer]
            self._holders.append(np.array(rows, dtype=np.int64).reshape(len(layer), most))
        self.owners: list[npt.NDArray[np.int64]] = []  # for each layer, the first holder of each expert, or LOST
        self.first: list[list[int]] = []  # the same as lists, which are quicker for the few experts of one token
        self.has_choice: list[bool] = []  # whether any expert of the layer has more than one holder
        self._options: list[list[Sequence[int]] | None] = []
        self._alive = np.zeros(len(self.names) + 1, dtype=np.bool_)  # the last is LOST's
        self.lost = 0  # experts that nobody can be asked for
        self.use(())

    def use(self, live: Collection[NodeName]) -> None:
        """From now on `live` are asked, and nobody else."""
        self._alive[:-1] = [name in live for name in self.names]
        self.owners, self.first, self.has_choice, self.lost = [], [], [], 0
        self._options = [None] * len(self._holders)
        for holders in self._holders:
            there = self._alive[holders]
            first = there.argmax(axis=1)
            rows = np.arange(len(holders))
            owner = np.where(there[rows, first], holders[rows, first], LOST)
            self.owners.append(owner)
            self.first.append(owner.tolist())
            self.has_choice.append(bool((there.sum(axis=1) > 1).any()))
            self.lost += int((owner == LOST).sum())

    def options(self, layer: int) -> list[Sequence[int]]:
        """For each expert of a layer the nodes that can be asked for it; none for one that is lost."""
        known = self._options[layer]
        if known is None:
            holders = self._holders[layer]
            there = self._alive[holders]
            known = [tuple(row[ok].tolist()) for row, ok in zip(holders, there, strict=True)]
            self._options[layer] = known
        return known

    def lost_experts(self, layer: int) -> list[int]:
        """The experts of a layer that nobody can be asked for."""
        return np.flatnonzero(self.owners[layer] == LOST).tolist()

    def owners_but(self, layer: int, avoid: Collection[NodeName]) -> list[int]:
        """For each expert of a layer a holder that is not among `avoid`, or LOST."""
        shut = {i for i, name in enumerate(self.names) if name in avoid}
        return [next((n for n in nodes if n not in shut), LOST) for nodes in self.options(layer)]

    def held_without(self, layer: int, experts: npt.NDArray[np.uint32], avoid: Collection[NodeName]) -> bool:
        """Whether each of `experts` can be asked for, of others than `avoid`."""
        owners = self.owners_but(layer, avoid)
        return all(owners[expert] != LOST for expert in set(experts.tolist()))
