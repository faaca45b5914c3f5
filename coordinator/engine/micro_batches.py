"""Whether the sequences that decode go through the trunk as one batch or as two that take turns.

Two micro-batches overlap: one computes while the other waits for its experts. But each reads the trunk's weights,
and its own experts, by itself. Which is faster depends on how the trunk's time and the nodes' grow with the batch, on
this machine, this model and these links, so it is measured, not calculated: both ways are tried for a while with the
sequences that there are, the faster one is kept, and the other is tried again now and then. The text does not depend
on it: kernels give a sequence the same bits whatever else is in the batch.

Two micro-batches' rate by one batch's, four sequences, a trunk and experts of made-up times for each layer
(tests/engine/test_batches.py): 1 ms of computing for each sequence and 2 ms of waiting: 1.5. 0.4 ms and 0.1 for each
sequence, waiting 0.6 and 0.3 for each: 1.44. 1 ms for any batch and 2 ms of waiting: 1. 2 ms for any batch and no
waiting: 0.5.
"""

from dataclasses import dataclass

TRIAL_ROUNDS = 12  # tokens of each sequence by which a way is measured
RETRY = 24  # trials of the faster way, then one of the other
MARGIN = 0.97  # two must take at most this share of one's time: less is noise


@dataclass(slots=True)
class _Measured:
    """One count of sequences: seconds for a token by number of passes, and what runs now."""

    seconds: dict[int, float]
    passes: int = 1
    trials: int = 0  # of this way since the last change


class MicroBatches:
    """Chooses, and learns from each pass."""

    def __init__(self) -> None:
        self._measured: dict[int, _Measured] = {}  # by the sequences' magnitude: 2 and 3, 4 to 7, …
        self._window: tuple[int, float] | None = None  # magnitude, and when the trial began
        self._tokens = 0  # of the trial

    def passes(self, sequences: int) -> int:
        """1 or 2: how many passes `sequences` that decode are spread over now."""
        return self._of(sequences).passes if sequences > 1 else 1

    def passed(self, sequences: int, tokens: int, now: float, alone: bool) -> None:
        """A pass of `tokens` sequences ended at `now` (seconds), of `sequences` that decode.

        Not `alone`: prompts were read meanwhile, which says nothing about either way.
        """
        magnitude = sequences.bit_length()
        if sequences < 2 or not alone:
            self._window = None
            return
        if self._window is None or self._window[0] != magnitude:
            self._window = magnitude, now
            self._tokens = 0
            return
        self._tokens += tokens
        if self._tokens >= TRIAL_ROUNDS * sequences:
            self._decide(self._of(sequences), (now - self._window[1]) / self._tokens)
            self._window = None

    def _decide(self, measured: _Measured, seconds: float) -> None:
        passes, other = measured.passes, 3 - measured.passes
        known = measured.seconds.get(passes)
        measured.seconds[passes] = seconds if known is None else (known + seconds) / 2
        measured.trials += 1
        if other not in measured.seconds or measured.trials >= RETRY:
            best = other
        else:
            best = 2 if measured.seconds[2] < MARGIN * measured.seconds[1] else 1
        if best != passes:
            measured.passes, measured.trials = best, 0

    def _of(self, sequences: int) -> _Measured:
        return self._measured.setdefault(sequences.bit_length(), _Measured({}))
