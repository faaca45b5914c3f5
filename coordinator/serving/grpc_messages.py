"""Between the messages of proto/inference.proto and the coordinator's own types."""

from dataclasses import asdict

from moehive.proto import inference_pb2 as pb

from ..engine.engine import EngineLoad
from ..engine.sequence import Finished
from ..types import FinishReason, InvalidRequest, SamplingParams, Token
from .generation import Chat, Message, Piece, TextRequest
from .status import ClusterStatus, ModelInfo
from .text import Text

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
}
SAMPLING_FIELDS = tuple(field.name for field in pb.SamplingParameters.DESCRIPTOR.fields)


def text_request(message: pb.GenerateRequest) -> TextRequest:
    """A client's request. Raises InvalidRequest when it holds no input."""
    given: str | Chat | tuple[int, ...]
    match message.WhichOneof("input"):
        case "prompt":
            given = message.prompt
        case "chat":
            given = Chat(tuple(Message(m.role, m.content) for m in message.chat.messages))
        case "tokens":
            given = tuple(message.tokens.ids)
        case _:
            raise InvalidRequest("The request has no input; set prompt, chat or tokens.", "prompt")
    sampling = message.sampling
    return TextRequest(
        input=given,
        request_id=message.request_id,
        model=message.model,
        sampling=SamplingParams(
            **{name: getattr(sampling, name) for name in SAMPLING_FIELDS if sampling.HasField(name)}
        ),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        stop=tuple(message.stop),
        logprobs=message.logprobs,
        ignore_eos=message.ignore_eos,
    )


def generate_reply(request_id: str, event: Piece | Finished, text: Text) -> pb.GenerateReply:
    """One message of a Generate stream."""
    if isinstance(event, Piece):
        tokens = [_token_result(token, text) for token in event.tokens]
        return pb.GenerateReply(request_id=request_id, text=event.text, tokens=tokens)
    usage = pb.Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        prompt_seconds=event.prompt_seconds,
        decode_seconds=event.decode_seconds,
    )
    return pb.GenerateReply(request_id=request_id, finish_reason=FINISH_REASONS[event.reason], usage=usage)


def _token_result(token: Token, text: Text) -> pb.TokenResult:
    top = [pb.TokenLogprob(token_id=i, logprob=logprob, text=text.show(i)) for i, logprob in token.top]
    return pb.TokenResult(token_id=token.id, logprob=token.logprob or 0.0, top=top)


def status_reply(version: str, model: ModelInfo, cluster: ClusterStatus, load: EngineLoad) -> pb.StatusReply:
    """The state of cluster and engine in one message."""
    return pb.StatusReply(
        version=version,
        model=model.id,
        ready=cluster.ready,
        reason=cluster.reason,
        epoch=cluster.epoch,
        nodes=[pb.NodeStatus(**asdict(node)) for node in cluster.nodes],
        running=load.running,
        waiting=load.waiting,
        kv_bytes_used=load.kv_bytes_used,
        kv_bytes_limit=load.kv_bytes_limit,
        resident_bytes=cluster.resident_bytes,
        uptime_seconds=cluster.uptime_seconds,
        cache_margin=cluster.cache_margin,
    )


def models_reply(model: ModelInfo) -> pb.ModelsReply:
    """The one model that is served."""
    return pb.ModelsReply(models=[pb.Model(**asdict(model))])
