"""Text from tokens, piece by piece: whole characters only, and stop strings found across token borders."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder puts for bytes that are no character (yet)
MAX_OPEN_BYTES = 3  # bytes of a UTF-8 character that may still wait for its last
MAX_WINDOW = 256  # tokens decoded again at each step, when none of them ends a character


class Detokenizer:
    """Decodes a growing list of tokens; the pieces together are the text of the whole list.

    A window of tokens is decoded, not the new one alone: a tokenizer may write a token differently at a text's
    start (sentencepiece drops its space). The window starts with tokens whose text is out already.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._context = 0  # tokens at the window's start whose text is out
        self._out = ""  # text of the window that is out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._window.append(token)
        text = self._decode(self._window)
        full = len(self._window) > MAX_WINDOW
        whole = text if full else _without_open_character(text)
        piece = whole[len(self._out) :]
        if full or (piece and whole == text):
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._out = self._decode(self._window)
        elif piece:
            self._out = whole
        return piece

    def flush(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD."""
        piece = self._decode(self._window)[len(self._out) :]
        self._out += piece
        return piece


def _without_open_character(text: str) -> str:
    end = len(text)
    while end > 0 and len(text) - end < MAX_OPEN_BYTES and text[end - 1] == REPLACEMENT:
        end -= 1
    return text[:end]


class StopFinder:
    """Passes text on until a stop string is complete; holds back what may be the beginning of one.

    The stop string that is complete first counts; of several complete at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now; sets `found`, after which nothing more is passed on."""
        if self.found or not text:
            return ""
        text = self._held + text
        complete = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if complete:
            self.found, self._held = True, ""
            return text[: min(complete)[1]]
        hold = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, at the end of a text without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
