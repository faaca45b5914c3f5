"""The OpenAI-compatible HTTP door: validates, translates, streams."""

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import time
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from moehive.proto.handshake import software_version

from ..engine.sequence import Finished
from ..types import CoordinatorError, InvalidRequest, Token
from .doors import CheckKey, bearer_key
from .generation import GenerationService, Piece, new_request_id
from .http import ClientLeft, EventStream, read_json, unless_client_leaves
from .openai_replies import ChatForm, CompletionForm, WrongKey, error_body, error_of
from .openai_requests import ChatCompletionRequest, CompletionRequest

log = logging.getLogger(__name__)

CLIENT_LEFT = 499  # nobody reads it; as in nginx's logs
Events = AsyncGenerator[Piece | Finished, None]
Form = CompletionForm | ChatForm
Body = TypeVar("Body", bound=BaseModel)


def openai_app(service: GenerationService, check_key: CheckKey | None = None) -> FastAPI:
    """The ASGI application. `check_key` None lets everybody in."""
    app = FastAPI(title="Moehive", version=software_version(), summary="OpenAI-compatible API of a Moehive cluster")
    created = int(time())
    model = service.model.id
    model_body = {"id": model, "object": "model", "created": created, "owned_by": "moehive"}
    _answer_errors(app)

    def require_key(request: Request) -> None:
        if check_key is not None and not check_key(bearer_key(request.headers.get("authorization"))):
            raise WrongKey("This coordinator wants an API key: send the header `authorization: Bearer KEY`.")

    api = APIRouter(prefix="/v1", dependencies=[Depends(require_key)])

    @app.get("/health", summary="200 when every expert has a node that is there, else 503")
    async def health() -> Response:
        status = service.cluster()
        body = {"status": "ok" if status.ready else "not ready", "reason": status.reason}
        return JSONResponse(body, 200 if status.ready else 503)

    @api.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_body]}

    @api.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model_body

    @api.post("/completions", openapi_extra=_body_schema(CompletionRequest))
    async def completions(request: Request) -> Response:
        body = _parse(CompletionRequest, await read_json(request))
        request_id = new_request_id()
        form = CompletionForm(request_id, model, int(time()), service.text, body.logprobs)
        return await _answer(request, service.generate(body.text_request(request_id)), form, body)

    @api.post("/chat/completions", openapi_extra=_body_schema(ChatCompletionRequest))
    async def chat_completions(request: Request) -> Response:
        body = _parse(ChatCompletionRequest, await read_json(request))
        request_id = new_request_id()
        alternatives = (body.top_logprobs or 0) if body.logprobs else None
        form = ChatForm(request_id, model, int(time()), service.text, alternatives)
        try:
            return await _answer(request, service.generate(body.text_request(request_id)), form, body)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), body.spelled(error.parameter)) from error

    app.include_router(api)
    return app


async def _answer(
    request: Request, events: Events, form: Form, body: CompletionRequest | ChatCompletionRequest
) -> Response:
    if not body.stream:
        return JSONResponse(await unless_client_leaves(request.receive, _whole(events, form)))
    # What can be refused is refused with its HTTP status, before the stream begins.
    first = await unless_client_leaves(request.receive, anext(events))
    return EventStream(_stream(first, events, form, body.include_usage))


async def _whole(events: Events, form: Form) -> dict[str, Any]:
    texts: list[str] = []
    tokens: list[Token] = []
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Finished):
                return form.whole("".join(texts), tokens, event)
            texts.append(event.text)
            tokens.extend(event.tokens)
    raise CoordinatorError("The generation ended without an end; send the request again.")


async def _stream(first: Piece | Finished, events: Events, form: Form, with_usage: bool) -> AsyncGenerator[str, None]:
    """The data of each server-sent event; an error is one of them, since the status is out already."""
    async with aclosing(events):
        if (opening := form.first()) is not None:
            yield json.dumps(opening)
        try:
            event = first
            while not isinstance(event, Finished):
                yield json.dumps(form.chunk(event.text, list(event.tokens)))
                event = await anext(events)
            yield json.dumps(form.last(event))
            if with_usage:
                yield json.dumps(form.counts(event))
        except CoordinatorError as error:
            yield json.dumps(error_of(error)[1])
        except Exception:
            log.exception("A stream failed in a way that nobody foresaw.")
            yield json.dumps(_unforeseen())
        yield "[DONE]"


def _parse(kind: type[Body], value: Any) -> Body:
    """Raises InvalidRequest that names the first wrong field."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = _path(value, first["loc"], missing=first["type"] == "missing")
        if first["type"] == "extra_forbidden":
            raise InvalidRequest(f"Unknown field {where[:100]!r}; leave it out.", where[:100]) from error
        what = f"{where}: {first['msg']}" if where else first["msg"]
        raise InvalidRequest(f"The request is not understood: {what[:300]}.", where[:100] or None) from error


def _path(value: Any, location: tuple[int | str, ...], missing: bool) -> str:
    """`messages.0.role`: the part of pydantic's location that is in the JSON; after it come names of its types."""
    found: list[str] = []
    for part in location:
        try:
            value = value[part]
        except (LookupError, TypeError):
            return ".".join([*found, str(part)] if missing else found)
        found.append(str(part))
    return ".".join(found)


def _body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """For the documentation at /docs: bodies are parsed here, not by FastAPI, so that errors have OpenAI's form."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _unforeseen() -> dict[str, Any]:
    return error_body("The coordinator failed on this request; its log has the reason.", "server_error")


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(CoordinatorError)
    async def known(_: Request, error: CoordinatorError) -> Response:
        status, body = error_of(error)
        return JSONResponse(body, status)

    @app.exception_handler(ClientLeft)
    async def left(_: Request, __: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}."
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, __: Exception) -> Response:
        return JSONResponse(_unforeseen(), 500)
