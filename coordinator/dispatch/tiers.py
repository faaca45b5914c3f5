"""What nodes that keep experts on disk have said of them, and what they are told in return."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moehive.proto import experts_pb2 as pb
from moehive.proto.tiers import read_on_disk, write_likely

from ..types import NodeName


class TierView:
    """`models.base.Tiers` of a cluster; use it on the event loop's thread."""

    def __init__(self, experts: Sequence[int], margin: float) -> None:
        """`experts` in each MoE layer; `margin` of cache-aware routing, 0: off."""
        self.margin = margin
        self.slow = False  # whether some node keeps experts on disk
        self._experts = experts
        self._on_disk: dict[NodeName, list[npt.NDArray[np.bool_] | None]] = {}
        self._likely: Sequence[Sequence[int]] = ()

    def expect(self, layers: Sequence[Sequence[int]]) -> None:
        """The layers after the one that is submitted next may ask for these experts, each likeliest first."""
        self._likely = layers

    def on_disk(self, layer: int) -> npt.NDArray[np.bool_] | None:
        """For each expert of a layer whether a node would have to read it first, as last heard; None: not known."""
        known = [layers[layer] for layers in self._on_disk.values()]
        masks = [mask for mask in known if mask is not None]
        return np.logical_or.reduce(masks) if masks else None

    @property
    def telling(self) -> bool:
        """Whether the next request has something to tell."""
        return bool(self._likely)

    def sent(self) -> None:
        """All messages of a layer have left: what was expected is no longer news."""
        self._likely = ()

    def tell(self, request: pb.ComputeRequest) -> None:
        """Adds to a request what its node should know."""
        if self._likely:
            write_likely(request, self._likely)

    def note(self, node: NodeName, layer: int, reply: pb.ComputeReply) -> None:
        """Takes from a reply what it says of the layer's experts. Raises WireError."""
        mask = read_on_disk(reply, self._experts[layer])
        if mask is not None:
            self.slow = True
            self._on_disk.setdefault(node, [None] * len(self._experts))[layer] = mask
        elif node in self._on_disk:  # it has all in memory now
            self.forget(node)

    def forget(self, node: NodeName) -> None:
        """A node has gone, or keeps nothing on disk any more."""
        self._on_disk.pop(node, None)
        self.slow = bool(self._on_disk)
