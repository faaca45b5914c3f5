"""The client's gRPC door: translates, delegates, and turns errors into statuses. Bounds: proto/inference.proto."""

import logging
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
from .generation import GenerationService, UnknownModel, new_request_id

log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
OURS = ((VERSION_KEY, software_version()),)  # metadata by which a client knows that it was we who refused, not gRPC
STATUS_OF_ERROR = (  # the first class that an error belongs to
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
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

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Writes the stream itself, so that a client's going away closes the generation at once."""
        wanted = grpc_messages.text_request(request)
        wanted = replace(wanted, request_id=wanted.request_id or new_request_id())
        async with aclosing(self._service.generate(wanted)) as events:
            async for event in events:
                await context.write(grpc_messages.generate_reply(wanted.request_id, event, self._service.text))

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
    host: str, port: int, service: GenerationService, tls: Tls | None = None, check_key: CheckKey | None = None
) -> GrpcDoor:
    """Serves on host:port (0: any free one). `check_key` None lets everybody in, on loopback only.

    Raises CoordinatorError for an address that would be open to others, OSError with a sentence for a port in use.
    """
    check_may_open(host, tls, check_key)
    keys = [] if check_key is None else [KeyInterceptor(check_key)]
    server = grpc.aio.server(
        options=channel.options(channel.MAX_CLIENT_BYTES), interceptors=[*keys, ErrorInterceptor()]
    )
    rpc.add_InferenceServicer_to_server(InferenceServicer(service), server)
    health_service = health.aio.HealthServicer()  # type: ignore[attr-defined]  # grpc_health has no types
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)  # type: ignore[no-untyped-call]
    for name in ("", SERVICE):
        await health_service.set(name, health_pb2.HealthCheckResponse.SERVING)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)  # type: ignore[no-untyped-call]
    bound = channel.bind(server, host, port, None if tls is None else _credentials(tls))
    await server.start()
    return GrpcDoor(server, bound, health_service)


def _credentials(tls: Tls) -> Any:
    """Reads the files at each handshake: certificates are replaced while the door is open."""

    def configuration() -> Any:
        pair = (tls.key_file.read_bytes(), tls.chain_file.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair])

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration)
