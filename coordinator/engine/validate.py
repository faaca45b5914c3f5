"""The bounds of a client's request, checked in one place before anything is allocated.

They are the bounds that proto/inference.proto states. Every check raises InvalidRequest, which names the
parameter and says what it may be.
"""

import math
from collections.abc import Sequence

from ..types import GenerationRequest, InvalidRequest, SamplingParams

MAX_REQUEST_ID = 128  # characters
MAX_TEXT = 4 << 20  # characters of a prompt or of a message
MAX_MESSAGES = 4096
MAX_PROMPT_IDS = 1 << 20
MAX_STOPS = 16
MAX_STOP = 1024  # characters
MAX_LOGPROBS = 20


def check_request(request: GenerationRequest, vocab_size: int, context_length: int) -> None:
    """Raises InvalidRequest for the first parameter of `request` that is out of bounds."""
    check_request_id(request.request_id)
    check_sampling(request.sampling)
    check_logprobs(request.logprobs)
    check_max_tokens(request.max_tokens)
    prompt = request.prompt
    if not prompt:
        raise InvalidRequest("The prompt is empty; send at least one token.", "prompt")
    if len(prompt) >= context_length:
        raise InvalidRequest(
            f"The prompt has {len(prompt)} tokens and the model's context holds {context_length}, the answer "
            "included; shorten the prompt.",
            "prompt",
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        wrong = next(token for token in prompt if not 0 <= token < vocab_size)
        raise InvalidRequest(
            f"Token id {wrong} is not in the model's vocabulary; ids go from 0 to {vocab_size - 1}.", "prompt"
        )


def check_request_id(request_id: str) -> None:
    """1 to MAX_REQUEST_ID characters."""
    if not 1 <= len(request_id) <= MAX_REQUEST_ID:
        raise InvalidRequest(
            f"request_id has {len(request_id)} characters; it may have 1 to {MAX_REQUEST_ID}.", "request_id"
        )


def check_sampling(params: SamplingParams) -> None:
    """Every sampling parameter in its range and finite."""
    _in_range("temperature", params.temperature, 0, 100)
    _in_range("top_k", params.top_k, 0, (1 << 32) - 1)
    _in_range("top_p", params.top_p, 0, 1, above=True)
    _in_range("min_p", params.min_p, 0, 1)
    _in_range("repetition_penalty", params.repetition_penalty, 0, 100, above=True)
    _in_range("presence_penalty", params.presence_penalty, -2, 2)
    _in_range("frequency_penalty", params.frequency_penalty, -2, 2)
    if params.seed is not None:
        _in_range("seed", params.seed, 0, (1 << 64) - 1)


def check_logprobs(alternatives: int) -> None:
    """0 to MAX_LOGPROBS."""
    _in_range("logprobs", alternatives, 0, MAX_LOGPROBS)


def check_max_tokens(max_tokens: int | None) -> None:
    """At least 1, or None."""
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequest(f"max_tokens is {max_tokens}; it must be at least 1.", "max_tokens")


def check_stops(stops: Sequence[str]) -> None:
    """At most MAX_STOPS stop strings of 1 to MAX_STOP characters."""
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"stop has {len(stops)} strings; it may have up to {MAX_STOPS}.", "stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP:
            raise InvalidRequest(f"A stop string has {len(stop)} characters; each may have 1 to {MAX_STOP}.", "stop")


def check_size(what: str, parameter: str, size: int, limit: int) -> None:
    """`size` (of `what`, for the sentence) at most `limit`."""
    if size > limit:
        raise InvalidRequest(f"{what} is too long: {size:,}; at most {limit:,} are read.", parameter)


def _in_range(name: str, value: float, low: float, high: float, above: bool = False) -> None:
    """`above`: `low` itself is out."""
    if not math.isfinite(value) or not low <= value <= high or (above and value == low):
        lower = f"above {low}" if above else f"at least {low}"
        raise InvalidRequest(f"{name} is {value:g}; it must be {lower} and at most {high}.", name)
