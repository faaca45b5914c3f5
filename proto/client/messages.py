"""Between the client's arguments and results and the messages of inference.proto."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from moehive.proto import inference_pb2 as pb

from .results import MoehiveError, Piece, TopLogprob, Usage

Result = TypeVar("Result")
FINISH_REASONS = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
}
SAMPLING_FIELDS = frozenset(field.name for field in pb.SamplingParameters.DESCRIPTOR.fields)


def generate_request(
    prompt: str | None,
    messages: Sequence[Mapping[str, str]] | None,
    token_ids: Sequence[int] | None,
    options: Mapping[str, Any],
) -> pb.GenerateRequest:
    """A request with just one of the three inputs. Raises MoehiveError for what no message can hold."""
    if sum(given is not None for given in (prompt, messages, token_ids)) != 1:
        raise MoehiveError("Give one of prompt, messages and token_ids.", "INVALID_ARGUMENT")
    request = pb.GenerateRequest()
    if prompt is not None:
        _set(request, "prompt", prompt)
    elif messages is not None:
        request.chat.SetInParent()
        for message in messages:
            _set(request.chat.messages.add(), "role", message.get("role", ""))
            _set(request.chat.messages[-1], "content", message.get("content", ""))
    else:
        request.tokens.SetInParent()
        _set(request.tokens, "ids", token_ids, shown="token_ids")
    for name, value in options.items():
        if value is not None:
            _set(request.sampling if name in SAMPLING_FIELDS else request, name, value)
    return request


def _set(message: Any, name: str, value: Any, shown: str | None = None) -> None:
    try:
        if isinstance(value, list | tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        text = f"{shown or name} can't be {str(value)[:100]!r}: {error}."
        raise MoehiveError(text, "INVALID_ARGUMENT") from error


def piece(reply: pb.GenerateReply, with_logprobs: bool) -> Piece:
    """One message of a stream."""
    result = Piece(reply.request_id, reply.text, [token.token_id for token in reply.tokens])
    if with_logprobs:
        result.logprobs = [token.logprob for token in reply.tokens]
        result.top_logprobs = [
            [TopLogprob(top.token_id, top.logprob, top.text) for top in token.top] for token in reply.tokens
        ]
    if reply.finish_reason:
        result.finish_reason = FINISH_REASONS.get(reply.finish_reason, "stop")
        result.usage = plain(Usage, reply.usage)
    return result


def plain(kind: type[Result], message: Any, **given: Any) -> Result:
    """The dataclass `kind` from a message with the same field names; `given` replaces some."""
    names = [field.name for field in fields(kind) if field.name not in given]  # type: ignore[arg-type]
    return kind(**{name: getattr(message, name) for name in names}, **given)
