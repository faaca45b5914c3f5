"""A link over a real stream: an answer counts for the request whose number it has, and for no other."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

import grpc.aio
import pytest

from moehive.coordinator.dispatch.link import Link
from moehive.coordinator.types import NodeName, NodeUnavailable
from moehive.proto import experts_pb2 as pb
from moehive.proto import experts_pb2_grpc
from moehive.proto.wire.channel import Channel
from moehive.proto.wire.windows import Inlet

Serve: TypeAlias = Callable[[list[pb.ComputeRequest], Any], Awaitable[None]]
SECONDS = 20


class TwoAtOnce(experts_pb2_grpc.ExpertsServicer):
    """Answers probes; waits for two requests and hands them to `serve`."""

    def __init__(self, serve: Serve) -> None:
        self._serve = serve

    async def Compute(self, request_iterator: Any, context: Any) -> None:
        asked: list[pb.ComputeRequest] = []
        while len(asked) < 2:
            request = await context.read()
            if request.epoch == 0:
                await context.write(pb.ComputeReply(id=request.id))  # a probe
            else:
                asked.append(request)
        await self._serve(asked, context)
        await context.read()


class Silent:
    """A stream on which nobody answers."""

    on_message: Any = None
    on_end: Any = None

    def send(self, message: Any) -> None:
        pass

    def take_natively(self, taker: Any) -> None:
        pass

    def outlet(self) -> tuple[int, int, int]:
        return 0, 0, 0

    def inlet(self) -> Inlet:
        return Inlet()

    def cancel(self) -> None:
        pass


@asynccontextmanager
async def linked(serve: Serve) -> AsyncIterator[Link]:
    """An open link to a node that does that."""
    server = grpc.aio.server()
    experts_pb2_grpc.add_ExpertsServicer_to_server(TwoAtOnce(serve), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    link = Link(NodeName("a"), address, Channel(address, None, "a"), lambda: None)
    try:
        await link.open()
        yield link
    finally:
        await link.close("The test is over.")
        await server.stop(None)


def test_an_answer_to_what_nobody_has_asked_ends_the_link_and_is_no_other_requests() -> None:
    async def lie(asked: list[pb.ComputeRequest], context: Any) -> None:
        await context.write(pb.ComputeReply(id=asked[0].id))
        await context.write(pb.ComputeReply(id=asked[1].id - 1, values=b"of the second"))

    async def main() -> None:
        async with linked(lie) as link:
            replies = [link.send((pb.ComputeRequest(epoch=1).SerializeToString(),), 0) for _ in range(2)]
            assert (await asyncio.wait_for(replies[0], SECONDS)).values == b""
            with pytest.raises(NodeUnavailable, match="nobody has sent"):
                await asyncio.wait_for(replies[1], SECONDS)
            with pytest.raises(NodeUnavailable, match="nobody has sent"):
                link.send((pb.ComputeRequest(epoch=1).SerializeToString(),), 0)

    asyncio.run(main())


def test_a_late_answer_to_a_request_that_was_given_up_is_dropped() -> None:
    async def late(asked: list[pb.ComputeRequest], context: Any) -> None:
        for number, request in enumerate(asked):
            await context.write(pb.ComputeReply(id=request.id, values=str(number).encode()))

    async def main() -> None:
        async with linked(late) as link:
            link.send((pb.ComputeRequest(epoch=1).SerializeToString(),), 0).cancel()
            second = link.send((pb.ComputeRequest(epoch=1).SerializeToString(),), 0)
            assert (await asyncio.wait_for(second, SECONDS)).values == b"1"

    asyncio.run(main())


def test_a_request_that_is_held_back_is_overtaken_and_one_that_is_given_up_is_never_sent() -> None:
    came: list[int] = []

    async def note(asked: list[pb.ComputeRequest], context: Any) -> None:
        came.extend(request.step for request in asked)
        for request in asked:
            await context.write(pb.ComputeReply(id=request.id))

    async def main() -> None:
        async with linked(note) as link:
            given_up, held, at_once = (
                link.send((pb.ComputeRequest(epoch=1, step=step).SerializeToString(),), 0, later=later)
                for step, later in ((1, 0.01), (2, 0.02), (3, 0.0))
            )
            given_up.cancel()
            await asyncio.wait_for(asyncio.gather(held, at_once), SECONDS)
            assert came == [3, 2]

    asyncio.run(main())


@pytest.mark.parametrize("turns", range(4))  # of the loop, from the channel's being ready
def test_a_link_that_is_given_up_as_it_opens_stays_given_up(turns: int) -> None:
    async def main() -> None:
        channel = Channel("127.0.0.1:9", None, "a")  # nobody answers there
        ready = asyncio.get_running_loop().create_future()
        waits = asyncio.Event()

        async def opened(method: str, metadata: Any) -> Any:
            waits.set()
            return await ready

        channel.open = opened  # type: ignore[method-assign]
        link = Link(NodeName("a"), "127.0.0.1:9", channel, lambda: None)
        opening = asyncio.create_task(link.open())
        await waits.wait()
        ready.set_result(Silent())
        for _ in range(turns):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        await link.close("The test is over.")

    asyncio.run(main())
