"""Who can be asked now: nodes that are linked, hold their slice, and have not failed lately.

A node that failed a request is shunned until it has answered a probe; one that answers no probe either loses its
link, which whoever keeps links (coordinator/follower.py) opens again.
"""

import asyncio
import logging
from collections.abc import Callable, Collection

from ..types import LOCAL, NodeName, NodeUnavailable
from .link import Link, probe

log = logging.getLogger(__name__)

REST_SECONDS = 0.5  # from a failure to the first probe
LOST_SECONDS = 8.0  # a node that answers no probe for so long loses its link


class Asking:
    """Use it on the event loop's thread. `changed` is called when somebody can be asked again or no more."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.links: dict[NodeName, Link] = {}
        self._changed = changed
        self._holding: frozenset[NodeName] | None = None  # None: not told yet
        self._shunned: dict[NodeName, asyncio.Task[None]] = {}  # and what probes them

    def live(self, with_local: bool) -> frozenset[NodeName]:
        """The nodes that can be asked."""
        there = self.links.keys() - self._shunned.keys()
        if with_local:
            there |= {LOCAL}
        return frozenset(there if self._holding is None else there & self._holding)

    def connect(self, link: Link) -> None:
        """Uses `link` for its node, in place of an older one."""
        self.links[link.node] = link
        self._forgive(link.node)
        self._changed()

    def disconnect(self, link: Link) -> None:
        """Forgets `link` if it is still its node's."""
        if self.links.get(link.node) is link:
            del self.links[link.node]
            self._forgive(link.node)
            self._changed()

    def holding(self, nodes: Collection[NodeName]) -> None:
        """Only these hold what the plan gives them; does not call `changed`."""
        self._holding = frozenset(nodes)

    def shun(self, node: NodeName) -> bool:
        """Asks a node no more until it has answered a probe; False when that is so already."""
        link = self.links.get(node)
        if node in self._shunned or link is None:
            return False
        self._shunned[node] = asyncio.get_running_loop().create_task(self._probe(link))
        self._changed()
        return True

    def _forgive(self, node: NodeName) -> None:
        task = self._shunned.pop(node, None)
        if task is not None and task is not asyncio.current_task():
            task.cancel()

    async def _probe(self, link: Link) -> None:
        await asyncio.sleep(REST_SECONDS)
        try:
            async with asyncio.timeout(LOST_SECONDS):
                await link.send(*probe(1))
        except NodeUnavailable:
            return  # the link has ended, and `disconnect` follows
        except TimeoutError:
            await link.close(
                f"Node {link.node} has answered nothing for {LOST_SECONDS:.0f} s; it is taken for lost until it "
                "answers again."
            )
            return
        if self.links.get(link.node) is link:
            log.info("Node %s answers again.", link.node)
            self._forgive(link.node)
            self._changed()
