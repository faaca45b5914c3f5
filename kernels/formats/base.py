"""The contract of a weight format: how a projection's numbers lie in bytes.

A format is one object beside the others in this folder, entered in `registry.py`. Three parties use it: the
checkpoint reader encodes, `blob.py` lays out, and the torch path and the tests decode. A native kernel computes
in the format's own bits and needs only its layout. How many bytes a weight takes stands in geometry.py, whose
readers plan with it and import no torch. A quantized format fills the same methods: its `view` returns whatever
tensor names its raw bytes without copying (uint8 blocks, for instance), and `decode` is the one place that says
which f32 numbers these bytes mean.
"""

from typing import Protocol

import torch


class WeightFormat(Protocol):
    """One way to store a projection [out, in]. Stateless; no method changes its arguments."""

    @property
    def name(self) -> str:
        """The name in `ExpertSpec.format`."""
        ...

    def encode(self, numbers: torch.Tensor, out: torch.Tensor) -> None:
        """Writes `numbers` (any float dtype) into `out` (uint8, as long as geometry says, aligned to 64)."""
        ...

    def view(self, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The stored form of `raw` (uint8 [bytes]) as a tensor that shares its memory."""
        ...

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """The f32 numbers, [out, in], that a `view` holds; may be the view itself."""
        ...
