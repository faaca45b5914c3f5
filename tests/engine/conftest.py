"""Fakes for the engine's tests."""

from pathlib import Path
from types import ModuleType

import pytest
from by_path import load
from hypothesis import settings

settings.register_profile("no-deadline", deadline=None)  # two shared cores say nothing about time
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The module fakes.py beside this file."""
    return load(Path(__file__).with_name("fakes.py"))
