"""The HTTP door, with OpenAI's own client."""

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import httpx
import openai
import pytest
from loops import LoopInAThread, loop_in_a_thread

from moehive.coordinator.serving.http import MAX_BODY_BYTES, serve_http
from moehive.coordinator.serving.openai import openai_app
from moehive.coordinator.types import CoordinatorError, NodeUnavailable


class Door:
    """A server on a loop of its own, since OpenAI's plain client blocks."""

    def __init__(self, served: Any, url: str, loop: LoopInAThread) -> None:
        self.served = served
        self.url = url
        self.run = loop.run

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, body: Any) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(f"{self.url}/v1/{path}", content=content)


@contextmanager
def opened(served: Any, check_key: Any = None) -> Iterator[Door]:
    with loop_in_a_thread() as loop:
        door = loop.run(serve_http("127.0.0.1", 0, openai_app(served.service, check_key), check_key=check_key))
        try:
            yield Door(served, f"http://127.0.0.1:{door.port}", loop)
        finally:
            loop.run(door.stop())
        load = served.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        served.engine.check_integrity()


CHAT: Any = {"model": "fake-moe", "messages": [{"role": "user", "content": "Capital?"}], "temperature": 0}
TEXT = "The capital of France is Paris 🙂."


def test_completion(serve: Callable[..., Any]) -> None:
    with opened(serve(says=TEXT)) as door:
        client = door.client()
        whole = client.completions.create(model="fake-moe", prompt="x", max_tokens=100, temperature=0, logprobs=2)
        (choice,) = whole.choices
        assert choice.text == TEXT and choice.finish_reason == "stop"
        count = len(door.served.service.text._tokenizer.encode(TEXT)) + 1
        assert whole.usage is not None
        assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
            1,
            count,
            count + 1,
        )
        logprobs = choice.logprobs
        assert logprobs is not None and logprobs.tokens is not None and logprobs.token_logprobs is not None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == count
        assert logprobs.text_offset is not None and logprobs.top_logprobs is not None
        assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
        assert all(1 <= len(top) <= 2 for top in logprobs.top_logprobs)

        ids = door.served.service.text._tokenizer.encode("x")
        for prompt in (ids, [ids], ["x"]):
            again = client.completions.create(model="fake-moe", prompt=prompt, max_tokens=100, temperature=0)
            assert again.choices[0].text == TEXT
        short = client.completions.create(model="fake-moe", prompt="x", temperature=0, max_tokens=2, stop="zzz")
        assert short.choices[0].finish_reason == "length"


def test_chat(serve: Callable[..., Any]) -> None:
    with opened(serve(says=TEXT)) as door:
        client = door.client()
        whole = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3)
        (choice,) = whole.choices
        assert choice.message.content == TEXT and choice.message.role == "assistant"
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None and choice.logprobs.content is not None
        for entry in choice.logprobs.content:
            assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].token == entry.token
        data = [byte for entry in choice.logprobs.content[:-1] for byte in entry.bytes or []]
        assert bytes(data).decode(errors="replace").startswith("The capital of France is Paris")
        bare = client.chat.completions.create(**CHAT, logprobs=True)
        assert bare.choices[0].logprobs is not None and bare.choices[0].logprobs.content is not None
        assert bare.choices[0].logprobs.content[0].top_logprobs == []
        parts: Any = [{"type": "text", "text": "Cap"}, {"type": "text", "text": "ital?"}]
        same = client.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": parts}]})
        assert same.usage is not None and whole.usage is not None
        assert same.usage.prompt_tokens == whole.usage.prompt_tokens
        cut = client.chat.completions.create(**CHAT, stop=[" of Fr"], user="me", metadata={"a": "b"}, store=False)
        assert cut.choices[0].message.content == "The capital" and cut.choices[0].finish_reason == "stop"
        limited = client.chat.completions.create(**CHAT, max_completion_tokens=1)
        assert limited.choices[0].finish_reason == "length"


def test_streams(serve: Callable[..., Any]) -> None:
    with opened(serve(says=TEXT)) as door:
        client = door.client()
        chunks = list(
            client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}, logprobs=True)
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert chunks[-1].choices == [] and chunks[-1].usage is not None
        with_logprobs = [c for c in chunks[:-1] if c.choices[0].logprobs]
        assert chunks[-1].usage.completion_tokens == len(with_logprobs)
        assert len({c.id for c in chunks}) == 1

        pieces = list(
            client.completions.create(model="fake-moe", prompt="x", max_tokens=99, temperature=0, stream=True)
        )
        assert "".join(piece.choices[0].text for piece in pieces) == TEXT
        assert pieces[-1].choices[0].finish_reason == "stop" and pieces[-1].usage is None
        raw = door.post("completions", {"prompt": "x", "stream": True})
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert raw.text.endswith("data: [DONE]\n\n")


def test_same_seed_same_text(serve: Callable[..., Any]) -> None:
    with opened(serve()) as door:
        client = door.client()
        extra = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "ignore_eos": True}
        texts = [
            client.completions.create(
                model="", prompt="x", seed=seed, top_p=0.9, presence_penalty=0.1, extra_body=extra
            )
            .choices[0]
            .text
            for seed in (1, 1, 2)
        ]
        assert texts[0] == texts[1] != texts[2]


def test_models_and_health(serve: Callable[..., Any]) -> None:
    with opened(serve()) as door:
        client = door.client()
        assert [model.id for model in client.models.list()] == ["fake-moe"]
        assert client.models.retrieve("fake-moe").owned_by == "moehive"
        with pytest.raises(openai.NotFoundError, match="'other' is not served"):
            client.models.retrieve("other")
        assert httpx.get(f"{door.url}/health").json()["status"] == "ok"
        door.served.status = type(door.served.status)(ready=False, reason="Node b is away.")
        sick = httpx.get(f"{door.url}/health")
        assert sick.status_code == 503 and sick.json()["reason"] == "Node b is away."


def error(response: httpx.Response) -> tuple[int, str | None, str | None, str]:
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return response.status_code, body["error"]["param"], body["error"]["code"], body["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", "b"]}, "prompt", "one prompt a request"),
        ({"prompt": {"a": 1}}, "prompt", "prompt"),
        ({"prompt": [5, "a"]}, "prompt", "prompt"),
        ({"prompt": [-1]}, "prompt", "Token id -1"),
        ({"prompt": [1 << 70]}, "prompt", "Token id"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens"),
        ({"max_tokens": True}, "max_tokens", "max_tokens"),
        ({"temperature": -1}, "temperature", "temperature is -1"),
        ({"temperature": float("nan")}, "temperature", "temperature is nan"),
        ({"top_p": 0}, "top_p", "top_p is 0"),
        ({"n": 2}, "n", "n with this value"),
        ({"best_of": 2}, "best_of", "best_of"),
        ({"echo": True}, "echo", "echo"),
        ({"logprobs": 21}, "logprobs", "logprobs is 21"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "logit_bias"),
        ({"stop": ["x"] * 17}, "stop", "stop has 17"),
        ({"stop": ""}, "stop", "0 characters"),
        ({"stop": 7}, "stop", "stop"),
        ({"seed": -1}, "seed", "seed is -1"),
        ({"best_off": 1}, "best_off", "Unknown field 'best_off'"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "Unknown field"),
    ],
)
def test_wrong_fields_are_named(serve: Callable[..., Any], changes: dict[str, Any], param: str, words: str) -> None:
    with opened(serve()) as door:
        status, named, _, message = error(door.post("completions", {"prompt": "x", **changes}))
        assert (status, named) == (400, param) and words in message


def test_wrong_chats(serve: Callable[..., Any]) -> None:
    with opened(serve(context_length=64)) as door:
        image = [{"type": "image_url", "image_url": {"url": "x"}}]
        for changes, param in (
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "clown", "content": "x"}]}, "messages.0.role"),
            ({"messages": [{"role": "user", "content": image}]}, "messages.0.content"),
            ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
            ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
            ({"max_completion_tokens": 0}, "max_completion_tokens"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"tools": [{"type": "function"}]}, "tools"),
            ({"response_format": {"type": "json_object"}}, "response_format.type"),
            ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
            ({"top_logprobs": 2}, "top_logprobs"),
        ):
            status, named, _, message = error(door.post("chat/completions", {**CHAT, **changes}))
            assert status == 400 and named is not None and named.startswith(param), (changes, named, message)


def test_bodies_that_are_no_requests(serve: Callable[..., Any]) -> None:
    with opened(serve()) as door:
        for body in (b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"prompt": "\\ud800"}'):
            assert error(door.post("completions", body))[0] == 400, body[:20]
        large = json.dumps({"prompt": "x" * MAX_BODY_BYTES}).encode()
        assert error(door.post("completions", large))[0] == 413
        assert error(httpx.get(f"{door.url}/v1/completions"))[0] == 405
        assert error(httpx.get(f"{door.url}/nothing"))[0] == 404
        assert error(door.post("completions", {"prompt": "x", "model": "gpt"}))[:3] == (
            404,
            "model",
            "model_not_found",
        )
        assert door.client().completions.create(model="", prompt="x").choices[0].text is not None


def test_errors_of_the_cluster(serve: Callable[..., Any]) -> None:
    served = serve(kv_limit_bytes=3000)
    with opened(served) as door:
        client = door.client()
        with pytest.raises(openai.RateLimitError, match="KV cache"):
            client.completions.create(model="", prompt="x", max_tokens=100)
        served.experts.fail_at[0] = NodeUnavailable("b", "Node b is away; start it.")
        with pytest.raises(openai.InternalServerError, match="Node b is away; start it") as caught:
            client.completions.create(model="", prompt="x", max_tokens=2)
        assert caught.value.status_code == 503
        served.experts.fail_at[served.experts.calls + 10] = NodeUnavailable("b", "Node b is away; start it.")
        with pytest.raises(openai.APIError, match="Node b is away; start it"):
            list(client.completions.create(model="", prompt="x", max_tokens=9, stream=True))
        served.experts.fail_at[served.experts.calls] = ZeroDivisionError("secret")
        status, _, _, message = error(door.post("completions", {"prompt": "x"}))
        assert status == 500 and "secret" not in message
        served.status = type(served.status)(ready=False, reason="Expert 3 has no node.")
        assert error(door.post("completions", {"prompt": "x"}))[::3] == (503, "Expert 3 has no node.")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_sequence(serve: Callable[..., Any], fakes: ModuleType, stream: bool) -> None:
    served = serve(context_length=100_000, kv_limit_bytes=100_000_000)
    with opened(served) as door:
        body = json.dumps({"prompt": "x", "max_tokens": 90_000, "ignore_eos": True, "stream": stream}).encode()
        host, port = door.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            door.run(fakes.until(lambda: served.engine.load().generated_tokens > 10))
            if stream:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        door.run(fakes.until(lambda: served.engine.load().running == 0))
        assert served.engine.load().generated_tokens < 90_000


def test_keys(serve: Callable[..., Any]) -> None:
    with opened(serve(), check_key=lambda key: key == "right") as door:
        with pytest.raises(openai.AuthenticationError, match="API key"):
            door.client("wrong").models.list()
        assert error(door.post("completions", {"prompt": "x"}))[:3] == (401, None, "invalid_api_key")
        assert door.client("right").completions.create(model="", prompt="x").choices
        assert httpx.get(f"{door.url}/health").status_code == 200


def test_doors_that_must_not_open(serve: Callable[..., Any]) -> None:
    async def run() -> None:
        app = openai_app(serve().service)
        with pytest.raises(CoordinatorError, match="TLS and API keys are missing"):
            await serve_http("0.0.0.0", 0, app)
        door = await serve_http("127.0.0.1", 0, app)
        with pytest.raises(OSError, match="choose another port"):
            await serve_http("127.0.0.1", door.port, app)
        await door.stop()

    asyncio.run(run())


def test_documentation_of_the_api(serve: Callable[..., Any]) -> None:
    with opened(serve()) as door:
        schema = httpx.get(f"{door.url}/openapi.json").json()
        body = schema["paths"]["/v1/completions"]["post"]["requestBody"]
        assert "repetition_penalty" in body["content"]["application/json"]["schema"]["properties"]
