"""The contract of a weight format: how a projection's numbers lie in bytes.

A format is one object beside the others in this folder, entered in `registry.py`. Three parties use it: the
checkpoint reader encodes, `blob.py` lays out, and the torch path and the tests decode. A native kernel computes
in the format's own bits and needs only its layout. How many bytes a weight takes stands in geometry.py, whose
readers plan with it and import no torch. A block format's `view` is its raw bytes; file_rows.py
lays out a file's own rows.
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

    def decode(self, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The f32 numbers, of `shape`, that a `view` holds; may be the view itself."""
        ...
