"""Requests on disk: what was written is found again, and what is damaged, another's or too much is not."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moehive.coordinator.serving import journal as module
from moehive.coordinator.serving.journal import Journal


def test_tokens_are_found_again_and_more_are_added(tmp_path: Path) -> None:
    entry = Journal(tmp_path).begin("a", "owner", b"what was asked")
    for token in (5, 70_000, 0):
        entry.add(token)
    entry.close()
    again = Journal(tmp_path).find("a", "owner")
    assert again is not None and (again.request, again.tokens) == (b"what was asked", [5, 70_000, 0])
    again.add(9)
    again.close()
    last = Journal(tmp_path).find("a", "owner")
    assert last is not None and last.tokens == [5, 70_000, 0, 9]
    last.close()


def test_nobody_elses_entry_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("a", "owner", b"").close()
    assert journal.find("a", "another") is None
    assert journal.find("b", "owner") is None
    journal.drop("a")
    assert journal.find("a", "owner") is None


def test_half_a_token_is_none(tmp_path: Path) -> None:
    entry = Journal(tmp_path).begin("a", "owner", b"")
    entry.add(1)
    entry.close()
    (file,) = tmp_path.iterdir()
    with file.open("ab") as out:
        out.write(b"\x07\x00")
    again = Journal(tmp_path).find("a", "owner")
    assert again is not None and again.tokens == [1]
    again.add(2)
    again.close()
    last = Journal(tmp_path).find("a", "owner")
    assert last is not None and last.tokens == [1, 2]
    last.close()


@given(st.binary(max_size=64))
def test_any_bytes_in_a_file_are_an_entry_or_none(data: bytes) -> None:
    entry = module._parse(data)
    assert entry is None or (isinstance(entry.request, bytes) and all(token >= 0 for token in entry.tokens))


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 3)
    journal = Journal(tmp_path)
    for number in range(5):
        journal.begin(str(number), "owner", b"").close()
    found = []
    for number in range(5):
        entry = journal.find(str(number), "owner")
        if entry is not None:
            found.append(number)
            entry.close()
    assert found == [2, 3, 4] and len(list(tmp_path.iterdir())) == 3
    monkeypatch.setattr(module, "KEEP_SECONDS", -1.0)
    Journal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cant_be_had_costs_no_request(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    journal = Journal(tmp_path / "file" / "journal")
    entry = journal.begin("a", "owner", b"")
    entry.add(3)
    entry.close()
    assert entry.tokens == [3] and journal.find("a", "owner") is None
