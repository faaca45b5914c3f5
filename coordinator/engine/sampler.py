"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, draw.

Each sequence has a sampler of its own with its own random generator, so the same seed gives the same text
whatever else runs.

A vocabulary has some hundred thousand tokens and a step a few hundred microseconds, so nothing here sorts them all
unless it must: top-k leaves few before anything else looks at them, top-p looks at the likeliest first, a draw is one
random number and a sum. (Best of 7 with 152k tokens on one shared Zen 3 core: greedy 20 µs, torch's argmax 150.)
"""

import math

import numpy as np
import torch

from ..types import CoordinatorError, SamplingParams, Token

GREEDY_BELOW = 1e-5  # a lower temperature would overflow f32 on the way to the same answer
HEAD = 1024  # tokens among which top-p nearly always ends; more are sorted only when it does not


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits [vocab] of tokens that `seen` [vocab] bool marks: positive ones divided, others multiplied (CTRL)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: torch.Tensor, counts: torch.Tensor, presence: float, frequency: float) -> torch.Tensor:
    """Logits [vocab] less `presence` where counts [vocab] > 0, and less `frequency` times the count."""
    return logits - presence * (counts > 0) - frequency * counts


def top_k_ids(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Ids (int64, ascending) of the `k` <= vocab largest of logits [vocab]; ties with the k-th stay."""
    return torch.from_numpy(np.flatnonzero(logits.numpy() >= torch.topk(logits, k).values[-1].numpy()))


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities add up to `p`; one always stays."""
    if len(logits) > HEAD:
        values, order = torch.topk(logits, HEAD)
        probabilities = torch.exp(values - torch.logsumexp(logits, -1))
        before = probabilities.cumsum(-1) - probabilities
        if float(before[-1]) >= p:  # the set ends within the head
            kept = order[before < p]
            return torch.full_like(logits, -math.inf).scatter_(0, kept, logits[kept])
    ascending, order = torch.sort(logits)
    drop = torch.softmax(ascending, -1).cumsum(-1) <= 1 - p
    drop[-1] = False
    return logits.masked_fill(torch.empty_like(drop).scatter_(0, order, drop), -math.inf)


def draw(logits: torch.Tensor, generator: torch.Generator) -> int:
    """An index with the probabilities softmax(logits), for one number of `generator`: where it falls in their sum."""
    sums = torch.exp(logits - logits.max()).cumsum(-1, dtype=torch.float64)
    place = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    return int(torch.searchsorted(sums, place, right=True))


def keep_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """-inf for tokens less likely than `min_p` times the likeliest."""
    probabilities = torch.softmax(logits, -1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), -math.inf)


class Sampler:
    """Chooses one sequence's tokens and remembers them for the penalties."""

    def __init__(self, params: SamplingParams, prompt: tuple[int, ...], vocab_size: int, logprobs: int) -> None:
        """`logprobs`: alternatives to report with each token; 0 reports no log-probability at all."""
        self._params = params
        self._logprobs = logprobs
        penalties = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._greedy = params.temperature < GREEDY_BELOW and not penalties
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen: torch.Tensor | None = None
        self._counts: torch.Tensor | None = None
        if params.repetition_penalty != 1:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            self._seen[torch.tensor(prompt, dtype=torch.long)] = True
        if params.presence_penalty or params.frequency_penalty:
            self._counts = torch.zeros(vocab_size)

    def next(self, logits: torch.Tensor, forced: int | None = None) -> Token:
        """The token after f32 logits [vocab]: `forced`, if given, as if it had been drawn.

        Raises CoordinatorError when the logits are not numbers.
        """
        logits = logits.detach().to("cpu", torch.float32)
        values = logits.numpy()
        best = int(values.argmax())  # of a NaN, if there is one
        if not math.isfinite(values[best]):
            raise CoordinatorError(
                "The model's output is not a number, so a weight or an expert node's answer is damaged; "
                "check the checkpoint and the nodes' logs."
            )
        chosen = best if self._greedy else self._choose(logits)
        if forced is not None:
            chosen = forced
        if self._seen is not None:
            self._seen[chosen] = True
        if self._counts is not None:
            self._counts[chosen] += 1
        return self._with_logprobs(chosen, logits)

    def _choose(self, logits: torch.Tensor) -> int:
        params = self._params
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, params.repetition_penalty)
        if self._counts is not None:
            logits = penalize_counts(logits, self._counts, params.presence_penalty, params.frequency_penalty)
        if params.temperature < GREEDY_BELOW:
            return int(logits.numpy().argmax())
        ids: torch.Tensor | None = None  # of those that are left, when only some are looked at
        if 0 < params.top_k < len(logits):
            ids = top_k_ids(logits, params.top_k)
            logits = logits[ids]
        logits = (logits - logits.max()) / params.temperature
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p:
            logits = keep_min_p(logits, params.min_p)
        place = draw(logits, self._generator)
        return place if ids is None else int(ids[place])

    def _with_logprobs(self, chosen: int, logits: torch.Tensor) -> Token:
        if not self._logprobs:
            return Token(chosen)
        distribution = torch.log_softmax(logits, -1)
        values, ids = torch.topk(distribution, min(self._logprobs, len(distribution)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(distribution[chosen]), top)
