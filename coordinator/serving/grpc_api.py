"""The client's gRPC door: translates, delegates, and turns errors into statuses. Bounds: proto/inference.proto."""

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from moehive.proto import channel
from moehive.proto import inference_pb2 as pb
from moehive.proto import inference_pb2_grpc as rpc
from moehive.proto.handshake import VERSION_KEY, software_version

from ..types import CoordinatorError, InvalidRequest, NodeUnavailable, NoRoom, NotReady
from . import grpc_messages
from .doors import CheckKey, Tls, bearer_key, check_may_open
from .generation import GenerationService, Piece, UnknownModel, new_request_id
from .journal import Entry, Journal

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
OURS = ((VERSION_KEY, software_version()),)  # metadata by which a client knows that it was we who spoke, not gRPC
TAKE_OVER_SECONDS = 10.0  # for a stream to end that its client has left


class UnknownRequest(InvalidRequest):
    """A client wants the rest of a text that nobody remembers."""


STATUS_OF_ERROR = (  # the first class that an error belongs to
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (UnknownRequest, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (NoRoom, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (NodeUnavailable, grpc.StatusCode.UNAVAILABLE),
    (NotReady, grpc.StatusCode.UNAVAILABLE),
    (CoordinatorError, grpc.StatusCode.INTERNAL),
)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Turns what a handler raises into a status; a message that can't be parsed is INVALID_ARGUMENT.

    For handlers that read one request and, when they stream, write their replies themselves.
    """

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        streams = handler.response_streaming
        behavior = handler.unary_stream if streams else handler.unary_unary

        async def answer(data: bytes, context: Any) -> Any:
            async with errors_as_status(context):
                try:
                    request = handler.request_deserializer(data)
                except DecodeError as error:
                    raise InvalidRequest("The message is cut short or not of this method; send it again.") from error
                return await behavior(request, context)

        make = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        return make(answer, response_serializer=handler.response_serializer)


@asynccontextmanager
async def errors_as_status(context: Any) -> AsyncIterator[None]:
    """Ends the call with the status of an error raised inside; of an unexpected one the client learns no detail."""
    try:
        yield
    except CoordinatorError as error:
        code = next(code for kind, code in STATUS_OF_ERROR if isinstance(error, kind))
        await context.abort(code, str(error), OURS)
    except grpc.aio.AbortError:
        raise
    except Exception:
        log.exception("A call failed in a way that nobody foresaw.")
        await context.abort(
            grpc.StatusCode.INTERNAL, "The coordinator failed on this request; its log has the reason.", OURS
        )


class InferenceServicer(rpc.InferenceServicer):
    """moehive.inference.v1.Inference."""

    def __init__(self, service: GenerationService, journal: Journal | None) -> None:
        """`journal` None: no request can be resumed."""
        self._service = service
        self._journal = journal
        self._running: dict[str, asyncio.Task[None]] = {}  # the streams of journaled requests

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Writes the stream itself, so that a client's going away closes the generation at once."""
        request_id, received = request.request_id, request.resume_after
        if self._journal is None or not request_id:
            await self._stream(request, request_id or new_request_id(), None, 0, context)
            return
        owner = hashlib.sha256((bearer_key(_authorization(context)) or "").encode()).hexdigest()
        entry = None
        if request.HasField("resume_after"):
            await self._take_over(request_id)
            entry = self._journal.find(request_id, owner)
            if entry is not None:
                request = pb.GenerateRequest.FromString(entry.request)
            elif received:
                raise UnknownRequest("This request is not known here any more; send it anew.", "request_id")
        if entry is None:
            request.ClearField("resume_after")
            if not request.sampling.HasField("seed"):
                request.sampling.seed = secrets.randbits(63)
            if request_id in self._running:
                raise InvalidRequest("A generation with this request_id is running; choose another.", "request_id")
            entry = self._journal.begin(request_id, owner, request.SerializeToString())
        await context.send_initial_metadata(OURS)  # by it a client knows, before the first token, that it may resume
        task = asyncio.current_task()
        assert task is not None
        self._running[request_id] = task
        try:
            await self._stream(request, request_id, entry, received, context)
        except (InvalidRequest, NoRoom):
            self._journal.drop(request_id)
            raise
        finally:
            entry.close()
            if self._running.get(request_id) is task:
                del self._running[request_id]

    async def _stream(
        self, request: pb.GenerateRequest, request_id: str, entry: Entry | None, received: int, context: Any
    ) -> None:
        """Generates, writes each token down before it is sent, and sends those beyond the `received` first ones."""
        wanted = replace(grpc_messages.text_request(request), request_id=request_id)
        if entry is not None:
            wanted = replace(wanted, forced=tuple(entry.tokens))
        count = 0
        async with aclosing(self._service.generate(wanted)) as events:
            async for event in events:
                if isinstance(event, Piece) and event.tokens:
                    for token in event.tokens:
                        count += 1
                        if entry is not None and count > len(entry.tokens):
                            entry.add(token.id)
                    if count <= received:
                        continue
                await context.write(grpc_messages.generate_reply(request_id, event, self._service.text))

    async def _take_over(self, request_id: str) -> None:
        """Ends a stream whose client has come back on another one."""
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task], timeout=TAKE_OVER_SECONDS)

    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelReply:
        return pb.CancelReply(found=self._service.cancel(request.request_id))

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        service = self._service
        return grpc_messages.status_reply(software_version(), service.model, service.cluster(), service.load())

    async def Models(self, request: pb.ModelsRequest, context: Any) -> pb.ModelsReply:
        return grpc_messages.models_reply(self._service.model)


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Lets a call in when its metadata carries an API key; the health service is open to probes."""

    def __init__(self, check_key: CheckKey) -> None:
        self._check_key = check_key

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        metadata = dict(handler_call_details.invocation_metadata)
        is_health = handler_call_details.method.startswith("/grpc.health.v1.Health/")
        if handler is None or is_health or self._check_key(bearer_key(metadata.get("authorization"))):
            return handler
        return _refusing(handler)


def _authorization(context: Any) -> str | None:
    return dict(context.invocation_metadata() or ()).get("authorization")


def _refusing(handler: Any) -> Any:
    """A handler of the same kind that ends each call with UNAUTHENTICATED."""

    async def refuse(_: Any, context: Any) -> None:
        sentence = "This coordinator wants an API key: send the metadata `authorization: Bearer KEY`."
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, sentence, OURS)

    if handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


class GrpcDoor:
    """A running server; `port` is where."""

    def __init__(self, server: Any, port: int, health_service: Any) -> None:
        self._server = server
        self._health = health_service
        self.port = port

    async def stop(self, grace_s: float = 2.0) -> None:
        """Takes no new calls, gives running ones `grace_s` seconds, then ends them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def serve_grpc(
    host: str,
    port: int,
    service: GenerationService,
    tls: Tls | None = None,
    check_key: CheckKey | None = None,
    journal: Journal | None = None,
) -> GrpcDoor:
    """Serves on host:port (0: any free one). `check_key` None lets everybody in, on loopback only.

    `journal` keeps requests that have an id, so that their clients may come back for the rest.


    Raises CoordinatorError for an address that would be open to others, OSError with a sentence for a port in use.
    """
    check_may_open(host, tls, check_key)
    keys = [] if check_key is None else [KeyInterceptor(check_key)]
    server = grpc.aio.server(
        options=channel.options(channel.MAX_CLIENT_BYTES), interceptors=[*keys, ErrorInterceptor()]
    )
    rpc.add_InferenceServicer_to_server(InferenceServicer(service, journal), server)
    health_service = health.aio.HealthServicer()  # type: ignore[attr-defined]  # grpc_health has no types
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)  # type: ignore[no-untyped-call]
    for name in ("", SERVICE):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)  # type: ignore[no-untyped-call]
    bound = channel.bind(server, host, port, None if tls is None else _credentials(tls))
    await server.start()
    return GrpcDoor(server, bound, health_service)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    """Reads the files at each handshake: certificates are replaced while the door is open."""

    def identity() -> channel.Identity:
        return channel.Identity(tls.key_file.read_bytes(), tls.chain_file.read_bytes(), ca_pem=b"")

    return channel.server_credentials(identity)
