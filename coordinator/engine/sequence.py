"""One generation on its way: its tokens, its cache, its reader, its times."""

import asyncio
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from ..types import FinishReason, GenerationRequest, Token
from .sampler import Sampler

MAX_UNREAD = 16  # tokens made ahead of a slow reader; then its sequence, and nobody else's, waits
OPEN_ENDED_TOKENS = 1024  # KV cache that a request without max_tokens reserves at a time


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a generation."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int  # an end-of-text token included
    prompt_seconds: float  # from admission to the first token
    decode_seconds: float  # from the first token to the last


Event = Token | Finished


@dataclass(eq=False, slots=True)
class Sequence:
    """The state that a generation's steps change; made by Engine.generate, inside a running loop."""

    request: GenerationRequest
    max_tokens: int  # what the request and the context allow
    sampler: Sampler
    cache: Any = None
    prompt_done: int = 0  # prompt tokens that the cache holds
    reserved_tokens: int = 0  # that the KV reservation is for, prompt and answer
    generated: int = 0
    last: int | None = None  # token generated last, not yet in the cache
    admitted_at: float | None = None
    first_at: float | None = None
    last_at: float | None = None
    ending: FinishReason | Exception | None = None  # why its task was cancelled
    events: asyncio.Queue[Event | BaseException] = field(default_factory=asyncio.Queue)
    unread: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_UNREAD))

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def max_length(self) -> int:
        """Tokens that it may come to, prompt and answer."""
        return len(self.request.prompt) + self.max_tokens

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.request.prompt) + self.generated

    def tokens_to_reserve(self) -> int:
        """How many tokens the next KV reservation is for: all, or a stretch when the answer's end is open."""
        if self.request.max_tokens is not None:
            return self.max_length
        return min(self.max_length, self.length + OPEN_ENDED_TOKENS)

    def next_input(self, chunk: int) -> torch.Tensor:
        """int64 [T]: the next at most `chunk` tokens of the prompt, or the last token."""
        if self.last is not None:
            return torch.tensor([self.last])
        piece = self.request.prompt[self.prompt_done : self.prompt_done + chunk]
        self.prompt_done += len(piece)
        return torch.tensor(piece)

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that no forward pass has taken yet."""
        return len(self.request.prompt) - self.prompt_done

    def publish(self, token: Token) -> None:
        """A token is made: it goes to the reader."""
        self.last_at = monotonic()
        if self.first_at is None:
            self.first_at = self.last_at
        self.generated += 1
        self.last = token.id
        self.events.put_nowait(token)

    def reason_to_stop(self) -> FinishReason | None:
        """Why no further token may follow, if so."""
        if self.last in self.request.stop_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.generated >= self.max_tokens else None

    def finished(self, reason: FinishReason) -> Finished:
        """The closing event, with the times so far."""
        prompt_seconds = decode_seconds = 0.0
        if self.admitted_at is not None:
            prompt_seconds = (self.first_at or monotonic()) - self.admitted_at
        if self.first_at is not None and self.last_at is not None:
            decode_seconds = self.last_at - self.first_at
        return Finished(reason, len(self.request.prompt), self.generated, prompt_seconds, decode_seconds)
