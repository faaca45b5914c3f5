"""A thousand hostile files: each is read, or refused in one sentence, in bounded memory."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("moehive_fuzz", Path(__file__).with_name("fuzz.py"))
assert _spec is not None and _spec.loader is not None
fuzz = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fuzz)

INPUTS = 200  # for each of five readers


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_hostile_files_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    outcomes, growth = fuzz.fuzz(reader, INPUTS, tmp_path)
    assert outcomes[reader, "refused"] > INPUTS // 3 and outcomes[reader, "read"] > 0
    assert growth < fuzz.MEMORY_GROWTH
