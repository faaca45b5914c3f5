"""torch for a process that computes: without what only its compiler and its device "meta" need."""

import sys
from pathlib import Path
from types import ModuleType

_GPUS = ("/dev/nvidiactl", "/dev/kfd")
_SHAPES = "torch._meta_registrations"  # what shape each operation's result has, in Python


def import_torch() -> None:
    """Imports torch without the shapes of its operations, a third of the processor time of the import, and 18 MB.

    For a process that neither compiles nor uses the device "meta" nor a `torch.Generator`, before anything else
    imports torch. Where there is a GPU, whose state of random numbers is such a generator, it is imported as usual.
    """
    if "torch" in sys.modules or any(Path(device).exists() for device in _GPUS):
        return
    sys.modules[_SHAPES] = ModuleType(_SHAPES)
    import torch

    # Whoever names the module later gets the real one.
    del sys.modules[_SHAPES], torch._meta_registrations
