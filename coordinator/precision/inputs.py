"""What each layer's experts are asked with on the calibration text, in a file for each layer.

A large model's come to gigabytes (60 layers of 8192 tokens of 4096 numbers: 4 GB), so that they are written as they
come and only the layers in use are in memory; and a conversion that was killed finds them again. A file is a row of
records, one for each token: `hidden` bf16 [hidden], `ids` i32 [k], `weights` f32 [k].
"""

import os
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import torch

from moehive.kernels.digest import Digest, digest_of, new_digest

from ..models.base import ExpertBackend
from ..types import CoordinatorError
from .calibration import LayerInputs

_IN_MEMORY = 2  # layers: workers go through them in order


@dataclass(frozen=True, slots=True)
class InputsFile:
    """One layer's file: the numbers of a vector, experts of a token, tokens, and the hash of it all."""

    hidden: int
    top_k: int
    tokens: int
    digest: bytes


class KeptInputs:
    """The layers' inputs in `folder`. May be asked by several threads."""

    def __init__(self, folder: Path, files: Sequence[InputsFile]) -> None:
        self.files = tuple(files)
        self._folder = folder
        self._lock = Lock()
        self._read: OrderedDict[int, LayerInputs] = OrderedDict()

    def __len__(self) -> int:
        """Layers."""
        return len(self.files)

    def __getitem__(self, layer: int) -> LayerInputs:
        """One layer's. Raises CoordinatorError for a file that is not as it was written."""
        with self._lock:
            if layer not in self._read:
                while len(self._read) >= _IN_MEMORY:
                    self._read.popitem(last=False)
                self._read[layer] = _read(_place(self._folder, layer), self.files[layer])
            self._read.move_to_end(layer)
            return self._read[layer]


class Recorder:
    """An ExpertBackend that keeps what another is asked with, in files below `folder`."""

    def __init__(self, backend: ExpertBackend, folder: Path) -> None:
        self._backend = backend
        self._folder = folder
        self._layers: dict[int, _Written] = {}

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        """See ExpertBackend.submit. Raises OSError, too."""
        records = np.empty(len(hidden), _record(hidden.shape[1], ids.shape[1]))
        records["hidden"] = hidden.detach().bfloat16().cpu().view(torch.uint16).numpy()
        records["ids"] = ids.cpu().numpy()
        records["weights"] = weights.detach().float().cpu().numpy()
        if layer not in self._layers:
            self._layers[layer] = _Written(_place(self._folder, layer), hidden.shape[1], ids.shape[1])
        self._layers[layer].append(records)
        return self._backend.submit(layer, hidden, ids, weights)

    def finish(self) -> KeptInputs:
        """What was kept, on the disk. Raises OSError."""
        return KeptInputs(self._folder, [written.finish() for _, written in sorted(self._layers.items())])

    def close(self) -> None:
        """Lets go of the files."""
        for written in self._layers.values():
            written.file.close()


class _Written:
    """One layer's file while it grows."""

    def __init__(self, path: Path, hidden: int, top_k: int) -> None:
        self.file: BinaryIO = path.open("wb")
        self._hidden, self._top_k = hidden, top_k
        self._tokens = 0
        self._digest: Digest = new_digest()

    def append(self, records: "np.ndarray[Any, Any]") -> None:
        data = records.tobytes()
        self.file.write(data)
        self._digest.update(data)
        self._tokens += len(records)

    def finish(self) -> InputsFile:
        self.file.flush()
        os.fsync(self.file.fileno())
        return InputsFile(self._hidden, self._top_k, self._tokens, self._digest.digest())


def _place(folder: Path, layer: int) -> Path:
    return folder / f"inputs-{layer:05d}.bin"


def _record(hidden: int, top_k: int) -> "np.dtype[Any]":
    return np.dtype(
        [("hidden", np.uint16, (hidden,)), ("ids", np.int32, (top_k,)), ("weights", np.float32, (top_k,))]
    )


def _read(path: Path, file: InputsFile) -> LayerInputs:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    if digest_of(data) != file.digest:
        raise CoordinatorError(f"{path} is damaged; delete the pack that is not finished and convert again.")
    records = np.frombuffer(data, _record(file.hidden, file.top_k))
    return LayerInputs(
        torch.from_numpy(records["hidden"].copy()).view(torch.bfloat16),
        torch.from_numpy(records["ids"].astype(np.int64)),
        torch.from_numpy(records["weights"].copy()),
    )
