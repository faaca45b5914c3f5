"""Answers in OpenAI's JSON: whole, in chunks, and errors."""

from typing import Any

from ..engine.sequence import Finished
from ..types import CoordinatorError, FinishReason, InvalidRequest, NodeUnavailable, NoRoom, NotReady, Token
from .detokenizer import REPLACEMENT
from .generation import UnknownModel
from .http import BodyTooLarge
from .text import Text

# OpenAI has no word for a cancelled generation; its clients refuse unknown ones.
FINISH_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.CANCELLED: "stop"}


class WrongKey(CoordinatorError):
    """A request without a valid API key."""


ERRORS = (  # the first class that an error belongs to: HTTP status, type, code
    (WrongKey, 401, "invalid_request_error", "invalid_api_key"),
    (BodyTooLarge, 413, "invalid_request_error", None),
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (InvalidRequest, 400, "invalid_request_error", None),
    (NoRoom, 429, "rate_limit_error", "rate_limit_exceeded"),
    (NodeUnavailable, 503, "server_error", "node_unavailable"),
    (NotReady, 503, "server_error", "not_ready"),
    (CoordinatorError, 500, "server_error", None),
)


def error_body(message: str, kind: str, parameter: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The form of every error."""
    return {"error": {"message": message, "type": kind, "param": parameter, "code": code}}


def error_of(error: CoordinatorError) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error of ours."""
    status, kind, code = next((status, kind, code) for cls, status, kind, code in ERRORS if isinstance(error, cls))
    parameter = error.parameter if isinstance(error, InvalidRequest) else None
    return status, error_body(str(error), kind, parameter, code)


def usage(end: Finished) -> dict[str, int]:
    """Token counts."""
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


class CompletionForm:
    """/v1/completions."""

    def __init__(self, request_id: str, model: str, created: int, text: Text, alternatives: int | None) -> None:
        """`created`: seconds since 1970; `alternatives` for each token, None for no log-probabilities."""
        self._head = {"id": f"cmpl-{request_id}", "object": "text_completion", "created": created, "model": model}
        self._text = text
        self._alternatives = alternatives
        self._offset = 0  # characters before the next token

    def whole(self, text: str, tokens: list[Token], end: Finished) -> dict[str, Any]:
        """The answer to a request without stream."""
        return {**self._head, "choices": [self._choice(text, tokens, end)], "usage": usage(end)}

    def first(self) -> dict[str, Any] | None:
        """What a stream starts with."""
        return None

    def chunk(self, text: str, tokens: list[Token]) -> dict[str, Any]:
        """New text."""
        return {**self._head, "choices": [self._choice(text, tokens, None)]}

    def last(self, end: Finished) -> dict[str, Any]:
        """The chunk that says why it ends."""
        return {**self._head, "choices": [self._choice("", [], end)]}

    def counts(self, end: Finished) -> dict[str, Any]:
        """The chunk after it, when asked for."""
        return {**self._head, "choices": [], "usage": usage(end)}

    def _choice(self, text: str, tokens: list[Token], end: Finished | None) -> dict[str, Any]:
        reason = None if end is None else FINISH_REASONS[end.reason]
        return {"index": 0, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._alternatives is None or not tokens:
            return None
        shown = [self._text.show(token.id) for token in tokens]
        offsets = []
        for text in shown:
            offsets.append(self._offset)
            self._offset += len(text)
        tops = [{self._text.show(i): logprob for i, logprob in t.top[: self._alternatives]} for t in tokens]
        return {
            "tokens": shown,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops if self._alternatives else None,
            "text_offset": offsets,
        }


class ChatForm:
    """/v1/chat/completions."""

    def __init__(self, request_id: str, model: str, created: int, text: Text, alternatives: int | None) -> None:
        """As CompletionForm."""
        self._head = {"id": f"chatcmpl-{request_id}", "created": created, "model": model}
        self._text = text
        self._alternatives = alternatives

    def whole(self, text: str, tokens: list[Token], end: Finished) -> dict[str, Any]:
        """The answer to a request without stream."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": FINISH_REASONS[end.reason],
        }
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(end)}

    def first(self) -> dict[str, Any] | None:
        """What a stream starts with."""
        return self._chunk({"role": "assistant", "content": ""}, None)

    def chunk(self, text: str, tokens: list[Token]) -> dict[str, Any]:
        """New text."""
        return self._chunk({"content": text}, self._logprobs(tokens))

    def last(self, end: Finished) -> dict[str, Any]:
        """The chunk that says why it ends."""
        return self._chunk({}, None, FINISH_REASONS[end.reason])

    def counts(self, end: Finished) -> dict[str, Any]:
        """The chunk after it, when asked for."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(end)}

    def _chunk(
        self, delta: dict[str, str], logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self._alternatives is None or not tokens:
            return None
        content = []
        for token in tokens:
            top = [self._entry(i, logprob) for i, logprob in token.top[: self._alternatives]]
            content.append({**self._entry(token.id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        shown = self._text.show(token)
        # A part of a character has bytes that are not those of what is shown for it.
        data = None if REPLACEMENT in shown else list(shown.encode())
        return {"token": shown, "logprob": logprob, "bytes": data}
