"""Keeps a running coordinator's routing statistics on disk, and makes plans of them.

The file lies beside the coordinator's database. `moehive trace` reads it; the next start goes on from it.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic

from moehive.kernels.geometry import LayerGeometry, Manifest

from .dispatch.statistics import RoutingStatistics, save_statistics
from .placement.place import Measured, better, place
from .placement.traces import Trace
from .types import CoordinatorError, NodeName, Plan

log = logging.getLogger(__name__)

SAVE_SECONDS = 5.0
REPLAN_SECONDS = 600.0  # how often a better plan is looked for
ENOUGH_TOKENS = 1000  # of traffic, before a plan is made of it


def statistics_path(state_dir: Path, manifest: Manifest) -> Path:
    """Where a model's statistics are kept."""
    return state_dir / f"routing-{manifest.fingerprint[:16]}.msgpack"


class Traffic:
    """Restores statistics at the start, saves them every few seconds while they grow, and at the end."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._saved = 0
        self._looked = (monotonic(), 0)  # when `better` was last asked, and the tokens then
        self._saver: asyncio.Task[None] | None = None
        self.statistics = RoutingStatistics([layer.experts for layer in manifest.layers], manifest.layers[0].top_k)
        try:
            kept = RoutingStatistics.restore(path.read_bytes())
            if kept.same_layers(self.statistics):
                self.statistics, self._saved = kept, kept.tokens
                self._looked = (monotonic(), kept.tokens)
        except FileNotFoundError:
            pass
        except (CoordinatorError, OSError) as error:
            log.warning("Routing statistics start anew: %s", error)

    def start(self) -> None:
        """Begins to save, on the running loop."""
        self._saver = asyncio.create_task(self._save_forever())

    async def stop(self) -> None:
        """Saves what is new."""
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.gather(self._saver, return_exceptions=True)
        await self._save()

    def place(
        self,
        measured: Mapping[NodeName, Measured],
        capacities: Mapping[NodeName, int],
        layers: Sequence[LayerGeometry],
        epoch: int,
        previous: Plan | None = None,
    ) -> Plan:
        """A plan for the traffic so far, the one kept from earlier runs included; see placement/place.py."""
        experts, seq = self.statistics.trace()
        trace = Trace(experts, seq) if len(seq) >= ENOUGH_TOKENS else None
        return place(capacities, measured, layers, trace, epoch, previous)

    def better(
        self,
        measured: Mapping[NodeName, Measured],
        layers: Sequence[LayerGeometry],
        capacities: Mapping[NodeName, int],
        epoch: int,
        current: Plan,
    ) -> Plan | None:
        """A plan that is worth its copies, given the traffic since the last call; else None."""
        now, tokens = monotonic(), self.statistics.tokens
        (since, before), self._looked = self._looked, (now, tokens)
        experts, seq = self.statistics.trace()
        if len(seq) < ENOUGH_TOKENS or tokens == before:
            return None
        steps_per_s = (tokens - before) / (now - since)
        return better(capacities, measured, layers, Trace(experts, seq), epoch, current, steps_per_s)

    async def _save_forever(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            await self._save()

    async def _save(self) -> None:
        if self.statistics.tokens == self._saved:
            return
        tokens = self.statistics.tokens
        packed = self.statistics.packed()
        try:
            await asyncio.to_thread(save_statistics, packed, self._path)
        except OSError as error:
            log.warning("Routing statistics could not be saved: %s", error)
        self._saved = tokens
