"""Modules of the tests that lie beside them: pytest imports each file by itself, so they are no package."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load(path: Path) -> ModuleType:
    """The module in a file, made anew."""
    spec = importlib.util.spec_from_file_location(f"moehive_tests_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
