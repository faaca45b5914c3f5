"""A link over a real stream: an answer counts for the request whose number it has, and for no other."""

import asyncio
from typing import Any

import grpc.aio

from moehive.coordinator.dispatch.link import Link
from moehive.coordinator.types import NodeName
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.wire.channel import Channel


class OffByOne(experts_pb2_grpc.ExpertsServicer):
    """Waits for two requests; answers the second with a number that is one too low, then both as they should."""

    async def Compute(self, request_iterator: Any, context: Any) -> None:
        asked: list[pb.ComputeRequest] = []
        while len(asked) < 2:
            request = await context.read()
            if request.epoch == 0:
                await context.write(pb.ComputeReply(id=request.id))  # a probe
            else:
                asked.append(request)
        await context.write(pb.ComputeReply(id=asked[1].id - 1, values=b"of the second"))
        for number, request in enumerate(asked):
            await context.write(pb.ComputeReply(id=request.id, values=str(number).encode()))
        await context.read()


def test_an_answer_with_a_wrong_number_is_no_other_requests() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        experts_pb2_grpc.add_ExpertsServicer_to_server(OffByOne(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        link = Link(NodeName("a"), address, Channel(address, None, "a"), lambda: None)
        try:
            await link.open()
            replies = [link.send(pb.ComputeRequest(epoch=1)) for _ in range(2)]
            got = await asyncio.wait_for(asyncio.gather(*replies), 20)
            assert [reply.values for reply in got] == [b"0", b"1"]
        finally:
            await link.close("The test is over.")
            await server.stop(None)

    asyncio.run(main())
