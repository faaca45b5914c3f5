"""From logits to the next token: penalties, temperature, top-k, top-p, min-p, draw.

Each sequence has a sampler of its own with its own random generator, so the same seed gives the same text
whatever else runs.
"""

import math

import torch

from ..types import CoordinatorError, SamplingParams, Token

GREEDY_BELOW = 1e-5  # a lower temperature would overflow f32 on the way to the same answer


def penalize_repetition(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits [vocab] of tokens that `seen` [vocab] bool marks: positive ones divided, others multiplied (CTRL)."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def penalize_counts(logits: torch.Tensor, counts: torch.Tensor, presence: float, frequency: float) -> torch.Tensor:
    """Logits [vocab] less `presence` where counts [vocab] > 0, and less `frequency` times the count."""
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """-inf for all but the `k` largest of logits [vocab]; ties with the k-th stay."""
    if k >= len(logits):
        return logits
    return logits.masked_fill(logits < torch.topk(logits, k).values[-1], -math.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """-inf outside the smallest set of likeliest tokens whose probabilities add up to `p`; one always stays."""
    ascending, order = torch.sort(logits)
    drop = torch.softmax(ascending, -1).cumsum(-1) <= 1 - p
    drop[-1] = False
    return logits.masked_fill(torch.empty_like(drop).scatter_(0, order, drop), -math.inf)


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

    def next(self, logits: torch.Tensor) -> Token:
        """The token after f32 logits [vocab]. Raises CoordinatorError when they are not numbers."""
        logits = logits.detach().to("cpu", torch.float32)
        if not math.isfinite(float(logits.max())):  # max hands a NaN on
            raise CoordinatorError(
                "The model's output is not a number, so a weight or an expert node's answer is damaged; "
                "check the checkpoint and the nodes' logs."
            )
        chosen = self._choose(logits)
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
            return int(logits.argmax())
        logits = (logits - logits.max()) / params.temperature
        if params.top_k:
            logits = keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            logits = keep_top_p(logits, params.top_p)
        if params.min_p:
            logits = keep_min_p(logits, params.min_p)
        return int(torch.multinomial(torch.softmax(logits, -1), 1, generator=self._generator))

    def _with_logprobs(self, chosen: int, logits: torch.Tensor) -> Token:
        if not self._logprobs:
            return Token(chosen)
        distribution = torch.log_softmax(logits, -1)
        values, ids = torch.topk(distribution, min(self._logprobs, len(distribution)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(distribution[chosen]), top)
