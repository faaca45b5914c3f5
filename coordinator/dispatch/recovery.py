"""What somebody failed at, computed by others: holders, else this process, else whoever comes back in time."""

import asyncio
import logging
from collections.abc import Callable, Collection

import torch

from moehive.kernels.ops import Reduction

from ..types import CoordinatorError, NodeName
from .fallback import Fallback
from .parts import Sent
from .routes import Routes
from .routing import Share, only, pieces, split
from .rows import Rows, rows_of
from .star import Star

log = logging.getLogger(__name__)


class Recovery:
    """Use it on the event loop's thread."""

    def __init__(
        self,
        star: Star,
        routes: Routes,
        reduction: Reduction,
        fallback: Fallback | None,
        on_lie: Callable[[NodeName, str], None],
        wait_seconds: float,
    ) -> None:
        """`on_lie` hears of nodes that answered what cannot be true, with a sentence."""
        self._star = star
        self._routes = routes
        self._reduction = reduction
        self._fallback = fallback
        self._on_lie = on_lie
        self._wait_seconds = wait_seconds

    async def recover(self, sent: Sent, failed: list[Share], avoid: frozenset[NodeName] = frozenset()) -> list[Rows]:
        """The rows of `failed` from whoever else has the experts, but not from `avoid`.

        Raises NodeUnavailable when nobody could compute them for `wait_seconds`.
        """
        deadline = asyncio.get_running_loop().time() + self._wait_seconds
        parts: list[Rows] = []
        while failed:
            ids = only(sent.ids, failed)
            again = Sent(sent.layer, sent.hidden, ids, sent.weights, sent.device, self._star.settle, sent.step)
            self._star.ask(again, split(ids, sent.weights, self._routes.owner(sent.layer, ids, avoid)))
            lost, again.lost = again.lost, []
            for share in lost:
                parts += await self._last_resort(again, share, avoid, deadline)
            done, failed = await self._star.answers(again)
            parts += done
        return parts

    async def _last_resort(
        self, sent: Sent, share: Share, avoid: Collection[NodeName], deadline: float
    ) -> list[Rows]:
        """Rows of experts that nobody can be asked for: read here, else asked for once somebody is back.

        Raises NodeUnavailable at `deadline`.
        """
        fallback = self._fallback
        if fallback is not None and (at_once := fallback.experts_at_once(sent.layer)) > 0:
            try:
                done: list[Rows] = []
                for piece in pieces(sent.ids, sent.weights, share, at_once):
                    hidden = rows_of(sent.hidden, piece)
                    values = await fallback.compute(sent.layer, hidden, piece.routing, self._reduction)
                    done.append(Rows(piece, None, values))
                return done
            except (CoordinatorError, OSError, MemoryError) as error:
                log.warning("Experts of layer %d could not be read from the checkpoint: %s", sent.layer, error)
        while not self._routes.placed.held_without(sent.layer, share.routing.experts, avoid):
            try:
                async with asyncio.timeout_at(deadline):
                    await self._routes.change()
            except TimeoutError:
                raise self._routes.unavailable(sent.layer, int(share.routing.experts[0])) from None
        sent.lost.append(share)  # to be asked for again
        return []

    async def check(self, sent: Sent, parts: list[Rows]) -> list[Rows]:
        """Rows that are not numbers are computed by others; if theirs are, the nodes have lied."""
        if not bool(torch.isfinite(sent.hidden).all()):
            return parts  # what was asked was no number
        suspects: frozenset[NodeName] = frozenset()
        while damaged := [rows for rows in parts if rows.node is not None and not rows.finite]:
            suspects |= {rows.node for rows in damaged if rows.node is not None}
            parts = [rows for rows in parts if not any(rows is bad for bad in damaged)]
            parts += await self.recover(sent, [rows.share for rows in damaged], suspects)
        if all(rows.finite for rows in parts):
            for node in suspects:
                self._on_lie(node, f"Node {node} answered values that are not numbers in layer {sent.layer}.")
        return parts
