"""The one server interceptor of internal services: the handshake, and errors as statuses.

A caller of another protocol gets FAILED_PRECONDITION with a sentence that names both versions. A message that does
not parse or is out of its bounds gets INVALID_ARGUMENT, an error that the service knows gets the status that the
service gave it, and any other error gets INTERNAL: logged here with its traceback, which never leaves the process.
"""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from . import handshake
from .bounds import BoundsError

log = logging.getLogger(__name__)

MAX_DETAILS = 1024  # characters; they travel in a header, whose size is bounded

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class CallGuard(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # the stubs lack it
    """Checks each call's handshake and turns its errors into statuses."""

    def __init__(self, statuses: Mapping[type[Exception], grpc.StatusCode]) -> None:
        """`statuses` maps the errors whose text is a sentence for the caller; a subclass may come before its base."""
        self._statuses: dict[type[Exception], grpc.StatusCode] = {
            DecodeError: grpc.StatusCode.INVALID_ARGUMENT,
            BoundsError: grpc.StatusCode.INVALID_ARGUMENT,
            **statuses,
        }

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called by gRPC for each call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return None
        received = handler_call_details.invocation_metadata or ()
        refusal = handshake.mismatch([(key, value) for key, value in received])
        name = f"{'stream' if handler.request_streaming else 'unary'}_"
        name += "stream" if handler.response_streaming else "unary"
        behavior = getattr(handler, name)
        wrap = self._wrap_stream if handler.response_streaming else self._wrap_unary
        make = getattr(grpc, f"{name}_rpc_method_handler")
        # A stream's messages are parsed inside the service's own loop; a single one is parsed before it is called.
        deserializer = handler.request_deserializer
        if not handler.request_streaming:
            deserializer = _deferred(deserializer)
        return make(
            wrap(behavior, refusal, handler_call_details.method),
            request_deserializer=deserializer,
            response_serializer=_serialized(handler.response_serializer),
        )

    def _wrap_unary(self, behavior: Any, refusal: str | None, method: str) -> Any:
        async def call(request: Any, context: Context) -> Any:
            if refusal is not None:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
            try:
                return await behavior(_parsed(request), context)
            except Exception as error:
                await self._abort(error, context, method)

        return call

    def _wrap_stream(self, behavior: Any, refusal: str | None, method: str) -> Any:
        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            if refusal is not None:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
            try:
                async with aclosing(behavior(_parsed(request), context)) as replies:
                    async for reply in replies:
                        yield reply
            except Exception as error:
                await self._abort(error, context, method)

        async def write(request: Any, context: Context) -> None:
            if refusal is not None:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
            try:
                await behavior(_parsed(request), context)
            except Exception as error:
                await self._abort(error, context, method)

        # A service yields its replies, or writes them to the context (which costs less for each message).
        return generate if inspect.isasyncgenfunction(behavior) else write

    async def _abort(self, error: Exception, context: Context, method: str) -> NoReturn:
        if isinstance(error, grpc.aio.AbortError):  # the service has chosen its status itself
            raise error
        if isinstance(error, DecodeError):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The message is not valid protobuf of its type.")
        for kind, status in self._statuses.items():
            if isinstance(error, kind):
                await context.abort(status, str(error)[:MAX_DETAILS])
        log.error("%s failed", method, exc_info=error)
        await context.abort(
            grpc.StatusCode.INTERNAL, f"{method} failed; the log of the machine that serves it says why."
        )
        raise AssertionError("abort always raises")


def _serialized(serialize: Callable[[Any], bytes]) -> Callable[[Any], Any]:
    """A service may give a reply that is serialized already: bytes, or a tuple of buffers (proto/wire only)."""
    return lambda reply: reply if isinstance(reply, bytes | tuple) else serialize(reply)


class _Malformed:
    """Stands for a request that did not parse, until the behavior can answer it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _deferred(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return data if deserialize is None else deserialize(data)
        except DecodeError as error:
            return _Malformed(error)

    return parse


def _parsed(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise request.error
    return request
