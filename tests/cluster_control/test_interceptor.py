"""What callers are told of errors: sentences of known ones, nothing of the inside of unknown ones."""

import asyncio

import grpc
import grpc.aio
import pytest

from moehive.proto import channel
from moehive.proto.handshake import metadata
from moehive.proto.interceptor import MAX_DETAILS, CallGuard


class Known(Exception):
    pass


class MoreExact(Known):
    pass


STATUSES = {MoreExact: grpc.StatusCode.NOT_FOUND, Known: grpc.StatusCode.UNAVAILABLE}


def call(error, streaming):
    """Status and details of a call whose service raises `error`."""

    async def unary(request, context):
        raise error

    async def stream(request, context):
        yield b"first"
        raise error

    async def main():
        if streaming:
            handler = grpc.unary_stream_rpc_method_handler(stream)
        else:
            handler = grpc.unary_unary_rpc_method_handler(unary)
        server = grpc.aio.server(interceptors=[CallGuard(STATUSES)])
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", {"Do": handler}),))
        port = channel.bind(server, "127.0.0.1", 0, None)
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                if streaming:
                    replies = opened.unary_stream("/test.Test/Do")(b"", metadata=metadata(), timeout=10.0)
                    assert await replies.read() == b"first"
                    await replies.read()
                else:
                    await opened.unary_unary("/test.Test/Do")(b"", metadata=metadata(), timeout=10.0)
        await server.stop(0)
        return caught.value.code(), caught.value.details()

    return asyncio.run(main())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("error", "code"),
    [(Known("It is so."), grpc.StatusCode.UNAVAILABLE), (MoreExact("It is so."), grpc.StatusCode.NOT_FOUND)],
)
def test_a_known_error_is_its_sentence(error, code, streaming):
    assert call(error, streaming) == (code, "It is so.")


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_error_is_logged_and_its_inside_stays_here(streaming, caplog):
    code, details = call(ZeroDivisionError("/secret/path"), streaming)
    assert code == grpc.StatusCode.INTERNAL
    assert details == "/test.Test/Do failed; the log of the machine that serves it says why."
    assert any(record.exc_info and "/secret/path" in str(record.exc_info[1]) for record in caplog.records)


def test_a_long_sentence_is_cut():
    assert call(Known("ä" * 5000), False)[1] == "ä" * MAX_DETAILS
