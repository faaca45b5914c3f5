"""torch for a process that computes: without what only its compiler and its device "meta" need."""

import sys
from types import ModuleType

_SHAPES = "torch._meta_registrations"  # what shape each operation's result has, in Python


def import_torch() -> None:
    """Imports torch without the shapes of its operations, a third of the processor time of the import, and 18 MB.

    For a process that neither compiles nor uses the device "meta", before anything else imports torch.
    """
    if "torch" in sys.modules:
        return
    sys.modules[_SHAPES] = ModuleType(_SHAPES)
    import torch

    # Whoever names the module later gets the real one.
    del sys.modules[_SHAPES], torch._meta_registrations
