"""The JSON that OpenAI's clients send, as strict types; a field that means nothing here is an error by name.

Beside OpenAI's own fields there are top_k, min_p, repetition_penalty and ignore_eos.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..types import InvalidRequest, SamplingParams
from .generation import Chat, Message, TextRequest

Ignored = Annotated[Any, Field(description="Read and ignored.")]


class StreamOptions(BaseModel):
    """What a stream holds beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False
    include_obfuscation: Ignored = None


class _Generation(BaseModel):
    """What both kinds of completion share."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    def _sampling(self) -> SamplingParams:
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty")
        given = {name: getattr(self, name) for name in (*names, "frequency_penalty", "seed")}
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})

    def _stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def _check_unsupported(self, fields: Sequence[tuple[str, bool]]) -> None:
        """Raises InvalidRequest for the first field (name, asked for) that this server has no answer to."""
        for name, asked in (("n", self.n not in (None, 1)), ("logit_bias", bool(self.logit_bias)), *fields):
            if asked:
                raise InvalidRequest(f"{name} with this value is not supported here; leave it out.", name)

    @property
    def include_usage(self) -> bool:
        """Ends a stream with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def text_request(self, request_id: str) -> TextRequest:
        """In the service's terms. Raises InvalidRequest."""
        self._check_unsupported(
            [
                ("echo", bool(self.echo)),
                ("best_of", self.best_of not in (None, 1)),
                ("suffix", bool(self.suffix)),
            ]
        )
        return TextRequest(
            input=self._input(),
            request_id=request_id,
            model=self.model,
            sampling=self._sampling(),
            max_tokens=16 if self.max_tokens is None else self.max_tokens,  # OpenAI's default for this API
            stop=self._stops(),
            logprobs=0 if self.logprobs is None else max(self.logprobs, 1),
            ignore_eos=bool(self.ignore_eos),
        )

    def _input(self) -> str | tuple[int, ...]:
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt
        if not prompt:
            return ()
        if isinstance(prompt[0], int):
            return tuple(token for token in prompt if isinstance(token, int))
        if len(prompt) > 1:
            raise InvalidRequest(f"{len(prompt)} prompts came in one request; send one prompt a request.", "prompt")
        return prompt[0] if isinstance(prompt[0], str) else tuple(prompt[0])


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: Ignored = None
    refusal: None = None

    def message(self) -> Message:
        """In the service's terms; "developer" is the newer name of "system"."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class ResponseFormat(BaseModel):
    """Only plain text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]


class ChatCompletionRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: Ignored = None

    def text_request(self, request_id: str) -> TextRequest:
        """In the service's terms. Raises InvalidRequest."""
        self._check_unsupported(
            [
                ("tools", bool(self.tools)),
                ("tool_choice", self.tool_choice not in (None, "none", "auto")),
                ("top_logprobs", bool(self.top_logprobs) and not self.logprobs),
            ]
        )
        return TextRequest(
            input=Chat(tuple(message.message() for message in self.messages)),
            request_id=request_id,
            model=self.model,
            sampling=self._sampling(),
            max_tokens=self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens,
            stop=self._stops(),
            logprobs=max(self.top_logprobs or 0, 1) if self.logprobs else 0,
            ignore_eos=bool(self.ignore_eos),
        )

    def spelled(self, parameter: str | None) -> str | None:
        """This API's name of what the service calls `parameter`."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return None if parameter is None else names.get(parameter, parameter)
