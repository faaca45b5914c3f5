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


@pytest.mark.parametrize(
    ("busy", "receiver", "share"),
    [
        (False, "192.0.2.1", None),
        (True, "192.0.2.1", pacing.SHARE),
        (True, "fe80::1%eth0", pacing.SHARE),
        (True, "", pacing.SHARE),
        (True, "127.0.0.1", pacing.NEAR_SHARE),
        (True, "::1", pacing.NEAR_SHARE),
    ],
)
def test_chunks_pass_unchanged_and_rest_in_proportion(
    busy: bool, receiver: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, rests = [0.0], list[float]()

    async def sleep(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(pacing, "monotonic", lambda: clock[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)

    async def main() -> list[int]:
        passed = []
        async for chunk in Pace(lambda: busy).chunks(source(3), receiver):
            passed.append(chunk)
            clock[0] += 0.25 if chunk < 2 else 90.0  # sending takes a quarter of a second, the last one much longer
        return passed

    assert asyncio.run(main()) == [0, 1, 2]
    if share is None:
        assert rests == []
    else:
        assert rests == [pacing.FIRST_SECONDS / share, 0.25 / share, 0.25 / share, pacing.LONGEST_REST]


def test_a_stream_that_is_left_closes_its_source() -> None:
    closed = []

    async def watched() -> AsyncGenerator[int]:
        try:
            yield 1
            yield 2
        finally:
            closed.append(True)

    async def main() -> None:
        chunks: Any = Pace(lambda: False).chunks(watched(), "192.0.2.1")
        async for _ in chunks:
            break
        await chunks.aclose()

    asyncio.run(main())
    assert closed == [True]
