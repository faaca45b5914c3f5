"""What ends a text, and a tokenizer that is broken, in a checkpoint's directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from moehive.coordinator.checkpoints.tokenizer import end_tokens, load_tokenizer
from moehive.coordinator.types import CoordinatorError


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def test_end_tokens(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == frozenset()
    write(tmp_path / "config.json", text_config={"eos_token_id": 7})
    assert end_tokens(tmp_path) == {7}
    write(tmp_path / "config.json", eos_token_id=5, text_config={"eos_token_id": 7})
    assert end_tokens(tmp_path) == {5}
    write(tmp_path / "generation_config.json", eos_token_id=[1, 2])
    assert end_tokens(tmp_path) == {1, 2}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CoordinatorError, match=r"generation_config\.json is not valid JSON"):
        end_tokens(tmp_path)


@pytest.mark.parametrize("odd", ({"a": 1}, "2", [2, None], 2.0, True), ids=str)
def test_odd_end_tokens_are_one_sentence(tmp_path: Path, odd: Any) -> None:
    write(tmp_path / "config.json", text_config=[7])
    assert end_tokens(tmp_path) == frozenset()
    write(tmp_path / "config.json", eos_token_id=odd)
    with pytest.raises(CoordinatorError, match=r"config\.json says eos_token_id = .*; download it again\."):
        end_tokens(tmp_path)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "config.json", model_type="mixtral", eos_token_id=2)
    assert load_tokenizer(tmp_path) == (None, {2})


def test_a_broken_tokenizer_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path / "config.json", model_type="mixtral")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {"ty')
    with pytest.raises(CoordinatorError, match=r"can't be read .* remove the tokenizer's files"):
        load_tokenizer(tmp_path)
