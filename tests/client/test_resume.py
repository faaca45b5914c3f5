"""A stream that is cut goes on where it was: the client comes back by itself and gets the rest of the same text."""

import threading
from pathlib import Path
from typing import Any

import pytest

from moehive.client import Client, MoehiveError
from moehive.coordinator.serving.journal import Journal
from moehive.proto import inference_pb2 as pb

TOKENS = 40


def stop_after(
    door: Any, opened: Any, client: Client, tokens: int, reopen: Any, **options: Any
) -> tuple[str, list[int]]:
    """Streams; after `tokens` tokens the door is slammed, and opened again a little later."""
    text, ids = "", []
    reopening: threading.Thread | None = None
    for piece in client.stream("abc", max_tokens=TOKENS, ignore_eos=True, **options):
        text += piece.text
        ids += piece.token_ids
        if reopening is None and len(ids) >= tokens:
            door.run(opened.stop(0))
            reopening = threading.Thread(target=reopen)
            reopening.start()
    assert reopening is not None
    reopening.join()
    return text, ids


@pytest.mark.parametrize("after", [1, 17, TOKENS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rest_of_the_same_text_comes(door: Any, tmp_path: Path, after: int, temperature: float) -> None:
    opened = door.serve(journal=Journal(tmp_path))
    address = f"127.0.0.1:{opened.port}"
    options: dict[str, Any] = {"temperature": temperature, "seed": 5, "repetition_penalty": 1.3}
    with Client(address) as client:
        whole = client.generate("abc", max_tokens=TOKENS, ignore_eos=True, **options)
        again: list[Any] = []

        def reopen() -> None:
            again.append(door.serve(journal=Journal(tmp_path), port=opened.port))

        text, ids = stop_after(door, opened, client, after, reopen, **options)
    assert (text, ids) == (whole.text, whole.token_ids)
    for one in again:
        door.run(one.stop(0))


def test_a_request_that_was_taken_is_answered_although_no_token_had_come(door: Any, tmp_path: Path) -> None:
    opened = door.serve(journal=Journal(tmp_path))
    options: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 1.0, "seed": 5}
    with Client(f"127.0.0.1:{opened.port}") as client:
        whole = client.generate("abc", **options)
        calls, answers = door.experts.calls, []
        door.loop.call_soon_threadsafe(door.experts.gate.clear)
        asking = threading.Thread(target=lambda: answers.append(client.generate("abc", **options)))
        asking.start()
        door.run(door.fakes.until(lambda: door.experts.calls > calls))
        door.run(opened.stop(0))
        door.loop.call_soon_threadsafe(door.experts.gate.set)
        opened = door.serve(journal=Journal(tmp_path), port=opened.port)
        asking.join()
    assert [answer.token_ids for answer in answers] == [whole.token_ids]
    door.run(opened.stop(0))


def test_a_text_that_nobody_remembers_is_not_found(door: Any, tmp_path: Path) -> None:
    opened = door.serve(journal=Journal(tmp_path))
    with Client(f"127.0.0.1:{opened.port}") as client:
        request = pb.GenerateRequest(request_id="gone", prompt="abc", max_tokens=3, resume_after=2, ignore_eos=True)
        with pytest.raises(MoehiveError, match="not known here any more") as caught, client._errors():
            list(client._stub.Generate(request))
        assert caught.value.code == "NOT_FOUND"
        request.resume_after = 0
        assert sum(len(reply.tokens) for reply in client._stub.Generate(request)) == 3
        # With the id alone the rest of what was asked comes.
        rest = list(client._stub.Generate(pb.GenerateRequest(request_id="gone", resume_after=1)))
        assert sum(len(reply.tokens) for reply in rest) == 2 and rest[-1].usage.completion_tokens == 3
    door.run(opened.stop(0))
