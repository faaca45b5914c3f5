"""Fakes for the engine's tests."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)  # two shared cores say nothing about time
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The module fakes.py beside this file."""
    spec = importlib.util.spec_from_file_location("engine_fakes", Path(__file__).with_name("fakes.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
