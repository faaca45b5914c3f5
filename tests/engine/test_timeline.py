"""What a recorded timeline holds, and that nothing is held when none is recorded."""

import asyncio
import json
from pathlib import Path
from types import ModuleType

import pytest

from moehive.coordinator import timeline
from moehive.coordinator.engine.engine import Engine
from moehive.coordinator.types import GenerationRequest, SamplingParams


def test_off_by_default_and_after_a_recording() -> None:
    on = [timeline.current.on]
    with timeline.recording() as recorder, timeline.current.span("inside"):
        on.append(timeline.current.on)
    assert on == [False, True]
    with timeline.current.span("outside"):
        pass
    assert [span.name for span in recorder.spans] == ["inside"]


def test_passes_that_take_turns_have_tracks_of_their_own(tmp_path: Path) -> None:
    async def one(name: str) -> None:
        with timeline.current.track(name):
            for layer in range(3):
                with timeline.current.span(f"layer {layer}"):
                    await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(one("first"), one("second"))
        await one("third")

    with timeline.recording() as recorder:
        asyncio.run(both())
    tracks = {span.name: span.track for span in recorder.spans if "layer" not in span.name}
    assert tracks == {"first": 1, "second": 2, "third": 1}
    for track in (1, 2):
        spans = sorted((s for s in recorder.spans if s.track == track), key=lambda s: (s.start, -s.end))
        open_until: list[int] = []
        for span in spans:  # a viewer needs each to lie wholly inside, or wholly after, the one before
            while open_until and open_until[-1] <= span.start:
                open_until.pop()
            assert not open_until or span.end <= open_until[-1]
            open_until.append(span.end)


def test_a_hop_shows_the_node_inside_the_round_trip() -> None:
    async def run() -> None:
        reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        lost: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        timeline.current.hop("attic", reply, lambda nanoseconds: nanoseconds)
        timeline.current.hop("cellar", lost, lambda nanoseconds: nanoseconds)
        await asyncio.sleep(0.002)
        reply.set_result(1_000_000)
        lost.cancel()
        await asyncio.sleep(0)

    with timeline.recording() as recorder:
        asyncio.run(run())
    trip, compute = recorder.spans
    assert (trip.process, trip.name, compute.process, compute.name) == ("attic", "round trip", "attic", "compute")
    assert compute.end - compute.start == 1_000_000
    assert trip.start < compute.start and compute.end < trip.end
    assert recorder.seconds()["attic", "compute"] == 0.001


def test_a_node_that_reports_more_time_than_passed_stays_inside() -> None:
    async def run() -> None:
        reply: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        timeline.current.hop("attic", reply, lambda nanoseconds: nanoseconds)
        reply.set_result(1 << 62)
        await asyncio.sleep(0)

    with timeline.recording() as recorder:
        asyncio.run(run())
    trip, compute = recorder.spans
    assert (trip.start, trip.end) == (compute.start, compute.end)


def test_the_file_is_a_chrome_trace(tmp_path: Path, fakes: ModuleType) -> None:
    async def run() -> None:
        engine = Engine(fakes.FakeTrunk(max_sequences=4), fakes.FakeExperts(), 100_000)
        for name in "ab":
            sampling = SamplingParams(temperature=0)
            request = GenerationRequest(request_id=name, prompt=(1, 2), max_tokens=3, sampling=sampling)
            async for _ in engine.generate(request):
                pass

    with timeline.recording() as recorder:
        asyncio.run(run())
    recorder.write(tmp_path / "out.json")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
    trace = json.loads((tmp_path / "out.json").read_text())
    events = trace["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in complete].count("sample") == 6
    assert [event["name"] for event in complete].count("1 sequences, 1 tokens") == 4
    assert min(event["ts"] for event in complete) == 0 and all(event["dur"] >= 0 for event in complete)
    named = {(event["pid"], event.get("tid")): event["args"]["name"] for event in events if event["ph"] == "M"}
    assert named[1, None] == "coordinator" and named[1, 0] == "engine" and named[1, 1] == "pass 1"


def test_spans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeline, "MAX_SPANS", 10)
    with timeline.recording() as recorder:
        for _ in range(15):
            with timeline.current.span("x"):
                pass
    assert len(recorder.spans) == 10 and recorder.dropped == 5


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with pytest.raises(OSError):
        timeline.Recorder().write(tmp_path / "out.json")
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
