"""Copies rest while requests are answered, and only then."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from moehive.proto import pacing
from moehive.proto.pacing import Pace


async def source(count: int) -> AsyncGenerator[int]:
    for number in range(count):
        yield number


@pytest.mark.parametrize("busy", [False, True])
def test_chunks_pass_unchanged_and_rest_in_proportion(busy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rests = [0.0], list[float]()

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(pacing, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def main() -> list[int]:
        passed = []
        async for chunk in Pace(lambda: busy).chunks(source(3)):
            passed.append(chunk)
            clock[0] += 0.5 if chunk < 2 else 90.0  # sending takes half a second, the last one much longer
        return passed

    assert asyncio.run(main()) == [0, 1, 2]
    assert rests == ([0.5 / pacing.SHARE] * 2 + [pacing.LONGEST_REST] if busy else [])


def test_a_stream_that_is_left_closes_its_source() -> None:
    closed = []

    async def watched() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def main() -> None:
        chunks: Any = Pace(lambda: False).chunks(watched())
        async for _ in chunks:
            break
        await chunks.aclose()

    asyncio.run(main())
    assert closed == [True]
