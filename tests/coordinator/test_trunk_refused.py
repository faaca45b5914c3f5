"""A trunk that can't be made: what is said of too little memory, of a config's odd values and of other failures."""

import errno
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.models.lean import families
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.library import NativeLibraryError

TOO_MANY = 1 << 50  # bytes: more than a process can address


def raising(error: Exception) -> Callable[..., Any]:
    def made(*arguments: object) -> None:
        raise error

    return made


SHORTAGES = {
    "torch": lambda *arguments: torch.empty(TOO_MANY, dtype=torch.uint8),
    "numpy": lambda *arguments: np.empty(TOO_MANY, np.uint8),
    "the system": lambda *arguments: mmap.mmap(-1, TOO_MANY),
    "a GPU": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "the native library": raising(MemoryError("There is no memory left for another forward pass.")),
}


@pytest.mark.parametrize("of", SHORTAGES)
@pytest.mark.parametrize("family", ["mixtral", "dots1"])  # a lean trunk, and transformers' model
def test_too_little_memory(
    of: str, family: str, tiny_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_moe(family))
    monkeypatch.setattr(families, "read", SHORTAGES[of])
    monkeypatch.setattr(Checkpoint, "load_trunk", SHORTAGES[of])
    with pytest.raises(CoordinatorError) as caught:
        load_trunk(checkpoint, 1)
    sentence = str(caught.value)
    assert f"too little memory left for the trunk of {checkpoint.path}; end other programs" in sentence
    assert sentence.endswith(".") and "\n" not in sentence


@pytest.mark.parametrize("error", [TypeError("None is no number"), ValueError("No head of -1"), ZeroDivisionError()])
def test_odd_values_are_the_config_s(
    error: Exception, tiny_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families, "read", raising(error))
    with pytest.raises(CoordinatorError, match=r"does not describe a mixtral model: \w.*\.$"):
        load_trunk(Checkpoint.open(tiny_moe("mixtral")), 1)


def test_a_library_s_failure_is_not_the_config_s(
    tiny_moe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny_moe("mixtral"))
    monkeypatch.setattr(families, "read", raising(RuntimeError("could not create a primitive\nat some place")))
    with pytest.raises(CoordinatorError, match=r"^The trunk of .* can't be made: could not create a primitive\.$"):
        load_trunk(checkpoint, 1)
    for error in (NativeLibraryError("Of another build."), OSError(errno.EIO, "Input/output error", "x")):
        monkeypatch.setattr(families, "read", raising(error))
        with pytest.raises(type(error)) as caught:
            load_trunk(checkpoint, 1)
        assert caught.value is error
