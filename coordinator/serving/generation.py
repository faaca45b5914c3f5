"""The one door behind both APIs: text or tokens in, pieces of text with their tokens out."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from uuid import uuid4

from ..engine import validate
from ..engine.engine import Engine, EngineLoad
from ..engine.sequence import Finished
from ..types import FinishReason, GenerationRequest, InvalidRequest, NotReady, SamplingParams, Token
from .detokenizer import Detokenizer, StopFinder
from .status import ClusterStatus, ModelInfo
from .text import Text


class UnknownModel(InvalidRequest):
    """A request names a model that is not served."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that the model's chat template writes as one prompt."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """A generation as a client asks for it; bounds as in proto/inference.proto."""

    input: str | Chat | tuple[int, ...]  # a prompt, a chat, or token ids
    request_id: str = ""  # empty: one is made
    model: str = ""  # empty: the one that is served
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0
    ignore_eos: bool = False
    forced: tuple[int, ...] = ()  # see GenerationRequest


@dataclass(frozen=True, slots=True)
class Piece:
    """New text, whole characters, and the tokens since the last piece."""

    text: str
    tokens: tuple[Token, ...] = ()


class GenerationService:
    """Serves one model."""

    def __init__(
        self, engine: Engine, text: Text, model: ModelInfo, cluster_status: Callable[[], ClusterStatus]
    ) -> None:
        self._engine = engine
        self._cluster_status = cluster_status
        self.text = text
        self.model = model

    async def generate(self, request: TextRequest) -> AsyncGenerator[Piece | Finished, None]:
        """Yields pieces, then one Finished. Closing it ends the generation.

        Raises InvalidRequest, UnknownModel, NoRoom, NotReady, NodeUnavailable; see Engine.generate.
        """
        request = replace(request, request_id=request.request_id or new_request_id())
        self._check(request)
        tokens = await self._tokens(request)
        detokenizer, stops = Detokenizer(self.text.decode), StopFinder(request.stop)
        count, stopped = 0, False
        async with aclosing(self._engine.generate(tokens)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    rest = stops.push(detokenizer.flush()) + stops.flush()
                    if rest:
                        yield Piece(rest)
                    reason = FinishReason.STOP if stops.found else event.reason
                    yield replace(event, reason=reason, completion_tokens=count)
                elif not stopped:
                    count += 1
                    ends = event.id in tokens.stop_tokens
                    text = "" if ends else stops.push(detokenizer.push(event.id))
                    stopped = stops.found
                    if stopped:
                        self._engine.stop(tokens.request_id)
                    yield Piece(text, (event,))

    def cancel(self, request_id: str) -> bool:
        """Ends a generation within one step; False when none of this id runs."""
        validate.check_request_id(request_id)
        return self._engine.cancel(request_id)

    def check_model(self, name: str) -> None:
        """Raises UnknownModel unless `name` is what is served, or empty."""
        if name not in ("", self.model.id):
            raise UnknownModel(f"The model {name[:200]!r} is not served here; {self.model.id!r} is.", "model")

    def cluster(self) -> ClusterStatus:
        """The nodes, as of now."""
        return self._cluster_status()

    def load(self) -> EngineLoad:
        """The engine's counters, as of now."""
        return self._engine.load()

    def _check(self, request: TextRequest) -> None:
        """What is checked before the text is tokenized; the engine checks the rest."""
        validate.check_request_id(request.request_id)
        self.check_model(request.model)
        validate.check_max_tokens(request.max_tokens)
        validate.check_sampling(request.sampling)
        validate.check_logprobs(request.logprobs)
        validate.check_stops(request.stop)
        if request.stop and not self.text.has_tokenizer:
            raise InvalidRequest("This model has no tokenizer, so stop strings mean nothing; leave them out.", "stop")
        status = self._cluster_status()
        if not (status.ready or status.has_plan):
            raise NotReady(status.reason or "The cluster does not hold the whole model yet; try again later.")

    async def _tokens(self, request: TextRequest) -> GenerationRequest:
        return GenerationRequest(
            request_id=request.request_id,
            prompt=await self._prompt(request.input),
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            stop_tokens=frozenset() if request.ignore_eos else self.text.stop_tokens,
            logprobs=request.logprobs,
            forced=request.forced,
        )

    async def _prompt(self, given: str | Chat | tuple[int, ...]) -> tuple[int, ...]:
        match given:
            case str():
                validate.check_size("The prompt in characters", "prompt", len(given), validate.MAX_TEXT)
                return await self.text.encode(given)
            case Chat(messages):
                validate.check_size("The chat in messages", "messages", len(messages), validate.MAX_MESSAGES)
                for message in messages:
                    length = len(message.content)
                    validate.check_size("A message in characters", "messages", length, validate.MAX_TEXT)
                return await self.text.encode_chat([{"role": m.role, "content": m.content} for m in messages])
            case ids:
                validate.check_size("The prompt in tokens", "prompt", len(ids), validate.MAX_PROMPT_IDS)
                return ids


def new_request_id() -> str:
    """A request id that nobody else has."""
    return uuid4().hex
