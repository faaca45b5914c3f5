"""Pieces of text add up to the whole, and stop strings are found wherever the borders fall."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moehive.coordinator.serving.detokenizer import MAX_WINDOW, Detokenizer, StopFinder
from moehive.coordinator.serving.text import Text


def pieces(text: Text, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(text.decode)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@given(st.data())
def test_random_tokens_equal_the_full_decode(tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 5), max_size=60))
    text = Text(tokenizer, frozenset())
    assert "".join(pieces(text, ids)) == text.decode(ids)


@given(st.text(max_size=60))
def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerFast, written: str) -> None:
    written = written.replace("\ufffd", "")
    text = Text(tokenizer, frozenset())
    got = pieces(text, tokenizer.encode(written, add_special_tokens=False))
    assert "".join(got) == written
    assert not any("\ufffd" in piece for piece in got)


def test_each_token_shows_what_it_completes(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Text(tokenizer, frozenset())
    three_bytes = tokenizer.encode("\u0e3f", add_special_tokens=False)  # not in the corpus: three bytes
    assert len(three_bytes) == 3
    assert pieces(text, [*three_bytes, *tokenizer.encode("a")]) == ["", "", "\u0e3f", "a", ""]
    assert pieces(text, three_bytes[:2]) == ["", "", "\ufffd"]


def test_no_token_ever_ends_a_character(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that repeats one byte for ever: text goes out, and the window stays bounded."""
    text = Text(tokenizer, frozenset())
    (byte,) = [i for i in range(len(tokenizer)) if tokenizer.convert_ids_to_tokens(i) == "ħ"]  # 0x85
    longest = 0

    def decode(ids: object) -> str:
        nonlocal longest
        longest = max(longest, len(ids))  # type: ignore[arg-type]
        return text.decode(ids)  # type: ignore[arg-type]

    detokenizer = Detokenizer(decode)
    got = [detokenizer.push(byte) for _ in range(1000)]
    assert longest <= MAX_WINDOW + 2
    assert len("".join(got)) >= 990
    assert len("".join(got[:10])) == 7


def sentencepiece() -> Text:
    """A Llama-like tokenizer: spaces are part of words, unknown characters fall back to bytes."""
    words = ["<unk>", "<s>", *(f"<0x{n:02X}>" for n in range(256)), "▁", "▁Hello", "▁world", "a", "b", "▁a", "é"]
    bpe = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(words)}, merges=[], byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Text(PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>"), frozenset())


def test_sentencepiece_spaces() -> None:
    text = sentencepiece()
    ids = text._tokenizer.convert_tokens_to_ids
    hello, world, a, bos = ids("▁Hello"), ids("▁world"), ids("a"), ids("<s>")
    assert pieces(text, [bos, hello, world, a, world]) == ["", "Hello", " world", "a", " world", ""]
    assert pieces(text, [hello, bos, world]) == ["Hello", "", " world", ""]
    assert [text.show(token) for token in (world, a, bos)] == [" world", "a", "<s>"]
    e_acute = [ids("<0xC3>"), ids("<0xA9>")]
    assert pieces(text, [hello, *e_acute, world]) == ["Hello", "", "é", " world", ""]


@pytest.mark.parametrize("seed", range(20))
def test_sentencepiece_without_broken_bytes_equals_the_full_decode(seed: int) -> None:
    text = sentencepiece()
    ids = random.Random(seed).choices([0, 1, *range(258, 265)], k=40)
    assert "".join(pieces(text, ids)) == text.decode(ids)


ALPHABET = st.text("ab<|", max_size=40)


def first_stop(written: str, stops: list[str]) -> str | None:
    """The obvious search: the text before the stop string that is complete first."""
    for end in range(1, len(written) + 1):
        found = [stop for stop in stops if written[:end].endswith(stop)]
        if found:
            return written[: end - max(map(len, found))]
    return None


@given(ALPHABET, st.lists(st.text("ab<|", min_size=1, max_size=5), max_size=4), st.lists(st.integers(0, 40)))
def test_stop_strings_across_any_borders(written: str, stops: list[str], cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(written)) for cut in cuts), len(written)]
    finder = StopFinder(stops)
    shown = ""
    for start, end in pairwise(borders):
        shown += finder.push(written[start:end])
        assert written.startswith(shown), "what is out is never taken back"
    expected = first_stop(written, stops)
    assert finder.found == (expected is not None)
    assert shown + finder.flush() == (written if expected is None else expected)


def test_only_what_may_begin_a_stop_is_held() -> None:
    finder = StopFinder(["</s>", "END"])
    assert [finder.push(piece) for piece in ("a<", "b", "</", "s", "x", "EN")] == ["a", "<b", "", "", "</sx", ""]
    assert finder.flush() == "EN"
