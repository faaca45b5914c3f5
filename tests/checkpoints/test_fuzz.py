"""A thousand hostile files: each is read, or refused in one sentence, in bounded memory."""

from pathlib import Path

import pytest
from by_path import load

fuzz = load(Path(__file__).with_name("fuzz.py"))

INPUTS = 200  # for each of five readers


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_hostile_files_are_read_or_refused(reader: str, tmp_path: Path) -> None:
    outcomes, growth = fuzz.fuzz(reader, INPUTS, tmp_path)
    assert outcomes[reader, "refused"] > INPUTS // 3 and outcomes[reader, "read"] > 0
    assert growth < fuzz.MEMORY_GROWTH
