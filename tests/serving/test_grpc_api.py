"""The gRPC door over a real socket."""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from types import ModuleType
from typing import Any

import grpc
import psutil
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moehive.coordinator.cli.main import app
from moehive.coordinator.serving.grpc_api import serve_grpc
from moehive.coordinator.serving.status import ClusterStatus, NodeStatus, TierStatus
from moehive.coordinator.types import CoordinatorError, NodeUnavailable
from moehive.proto import inference_pb2 as pb
from moehive.proto import inference_pb2_grpc as rpc

FUZZ_EXAMPLES = int(os.environ.get("MOEHIVE_FUZZ_EXAMPLES", "200"))


def with_door(
    served: Any, use: Callable[[Any, Any], Any], channel_options: Sequence[tuple[str, int]] = (), **options: Any
) -> None:
    """Runs use(channel, stub) against a server on a free port, then checks that nothing is left."""

    async def run() -> None:
        door = await serve_grpc("127.0.0.1", 0, served.service, **options)
        served.port = door.port
        async with grpc.aio.insecure_channel(f"127.0.0.1:{door.port}", channel_options) as channel:
            await use(channel, rpc.InferenceStub(channel))
        await door.stop(0)
        load = served.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        served.engine.check_integrity()

    asyncio.run(run())


async def rest(call: Any) -> list[pb.GenerateReply]:
    """What a stream still holds."""
    replies = []
    while (reply := await call.read()) is not grpc.aio.EOF:
        replies.append(reply)
    return replies


async def refused(call: Any, code: grpc.StatusCode) -> str:
    """The sentence of a call that must fail with `code`."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (rest(call) if hasattr(call, "read") else call)
    assert caught.value.code() is code, caught.value
    details: str = caught.value.details()
    assert "Traceback" not in details and len(details) > 10
    return details


def greedy(**more: Any) -> pb.GenerateRequest:
    more.setdefault("sampling", pb.SamplingParameters(temperature=0))
    return pb.GenerateRequest(**more)


def test_generate_text(serve: Callable[..., Any]) -> None:
    served = serve(says="Größe: the capital 🙂 of France")

    async def use(_: Any, stub: Any) -> None:
        call = stub.Generate(greedy(prompt="What?", request_id="mine", logprobs=2))
        replies = [reply async for reply in call]
        assert {reply.request_id for reply in replies} == {"mine"}
        assert "".join(reply.text for reply in replies) == "Größe: the capital 🙂 of France"
        tokens = [token for reply in replies for token in reply.tokens]
        assert tokens[-1].token_id == served.service.text._tokenizer.eos_token_id
        assert all(len(t.top) == 2 and t.top[0].token_id == t.token_id and t.logprob <= 0 for t in tokens)
        assert [reply.finish_reason for reply in replies[:-1]] == [0] * (len(replies) - 1)
        last = replies[-1]
        assert last.finish_reason == pb.FINISH_REASON_STOP
        assert last.usage.completion_tokens == len(tokens)
        assert last.usage.prompt_tokens == len(served.service.text._tokenizer.encode("What?"))
        assert last.usage.prompt_seconds > 0

    with_door(served, use)


def test_token_ids_without_a_tokenizer(serve: Callable[..., Any], fakes: ModuleType) -> None:
    served = serve(vocab_size=30)
    served.service.text._tokenizer = None

    async def use(_: Any, stub: Any) -> None:
        call = stub.Generate(greedy(tokens=pb.TokenIds(ids=[1, 2]), max_tokens=4))
        tokens = [token.token_id async for reply in call for token in reply.tokens]
        history = [1, 2]
        for _ in range(4):
            history.append(int(fakes.next_logits(history, 30).argmax()))
        assert tokens == history[2:]
        for text in (pb.GenerateRequest(prompt="x"), pb.GenerateRequest(chat=pb.ChatMessages())):
            sentence = await refused(stub.Generate(text), grpc.StatusCode.INVALID_ARGUMENT)
            assert "no tokenizer" in sentence

    with_door(served, use)


def test_chat_writes_the_template(serve: Callable[..., Any]) -> None:
    served = serve(says="Paris.")
    tokenizer = served.service.text._tokenizer

    async def use(_: Any, stub: Any) -> None:
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Capital of France?")])
        replies = [reply async for reply in stub.Generate(greedy(chat=chat))]
        assert "".join(reply.text for reply in replies) == "Paris."
        expected = "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\n"
        fed = [token for step in served.trunk.steps for token in step]
        assert fed[: replies[-1].usage.prompt_tokens] == tokenizer.encode(expected, add_special_tokens=False)
        wrong = pb.ChatMessages(messages=[pb.ChatMessage(role="clown", content="x")])
        sentence = await refused(stub.Generate(greedy(chat=wrong)), grpc.StatusCode.INVALID_ARGUMENT)
        assert "no such role: clown" in sentence

    with_door(served, use)


def test_stop_string_across_tokens(serve: Callable[..., Any]) -> None:
    served = serve(says="The capital of France is Paris. The capital of Spain")

    async def use(_: Any, stub: Any) -> None:
        replies = [reply async for reply in stub.Generate(greedy(prompt="x", stop=["s P", "nce is Par"]))]
        assert "".join(reply.text for reply in replies) == "The capital of France i"
        assert replies[-1].finish_reason == pb.FINISH_REASON_STOP
        assert replies[-1].usage.completion_tokens == sum(len(reply.tokens) for reply in replies)

    with_door(served, use)


def test_cancel_and_duplicate(serve: Callable[..., Any]) -> None:
    served = serve()

    async def use(_: Any, stub: Any) -> None:
        call = stub.Generate(greedy(prompt="x", request_id="a", ignore_eos=True))
        await call.read()
        sentence = await refused(stub.Generate(greedy(prompt="x", request_id="a")), grpc.StatusCode.INVALID_ARGUMENT)
        assert "request_id" in sentence
        assert (await stub.Cancel(pb.CancelRequest(request_id="a"))).found
        replies = await rest(call)
        assert replies[-1].finish_reason == pb.FINISH_REASON_CANCELLED
        assert not (await stub.Cancel(pb.CancelRequest(request_id="a"))).found
        await refused(stub.Cancel(pb.CancelRequest()), grpc.StatusCode.INVALID_ARGUMENT)

    with_door(served, use)


@pytest.mark.parametrize("close_channel", [False, True])
def test_a_client_that_leaves_frees_its_sequence(
    serve: Callable[..., Any], fakes: ModuleType, close_channel: bool
) -> None:
    served = serve(context_length=100_000, kv_limit_bytes=100_000_000)

    async def use(channel: Any, stub: Any) -> None:
        call = stub.Generate(greedy(prompt="x", ignore_eos=True, max_tokens=50_000))
        await call.read()
        assert served.engine.load().running == 1
        if close_channel:
            await channel.close()
        else:
            call.cancel()
        await fakes.until(lambda: served.engine.load().running == 0)
        assert served.engine.load().generated_tokens < 50_000

    with_door(served, use)


def test_a_client_that_does_not_read_stops_its_own_generation(serve: Callable[..., Any], fakes: ModuleType) -> None:
    """gRPC's flow control reaches the engine: the server never holds more than its windows."""
    served = serve(context_length=100_000, kv_limit_bytes=100_000_000, layers=1)

    async def use(_: Any, stub: Any) -> None:
        slow = stub.Generate(greedy(prompt="x", ignore_eos=True, max_tokens=90_000, logprobs=20))
        await slow.read()
        others = 0
        made, before = served.engine.load().generated_tokens, -1
        while made != before:  # until 40 steps of another sequence bring no token of this one
            before = made
            _ = [r async for r in stub.Generate(greedy(prompt="y", ignore_eos=True, max_tokens=40))]
            made = served.engine.load().generated_tokens - 40 * (others := others + 1)
        assert made < 2_000
        slow.cancel()
        await fakes.until(lambda: served.engine.load().running == 0)

    # Small windows, so that they fill up soon.
    with_door(served, use, channel_options=[("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 4096)])


def test_every_error_has_its_status(serve: Callable[..., Any]) -> None:
    served = serve(context_length=64, kv_limit_bytes=3000)

    async def use(_: Any, stub: Any) -> None:
        invalid = {
            "empty": greedy(prompt=""),
            "no input": greedy(),
            "max_tokens is 0": greedy(prompt="x", max_tokens=0),
            "max_tokens is -3": greedy(prompt="x", max_tokens=-3),
            "temperature is -1": pb.GenerateRequest(prompt="x", sampling=pb.SamplingParameters(temperature=-1)),
            "temperature is nan": greedy(prompt="x", sampling=pb.SamplingParameters(temperature=float("nan"))),
            "top_p is 2": pb.GenerateRequest(prompt="x", sampling=pb.SamplingParameters(top_p=2)),
            "logprobs is 21": greedy(prompt="x", logprobs=21),
            "stop has 17": greedy(prompt="x", stop=["a"] * 17),
            "Token id 4000000000": greedy(tokens=pb.TokenIds(ids=[4_000_000_000])),
            "has 64 tokens and the model's context holds 64": greedy(tokens=pb.TokenIds(ids=[1] * 64)),
            "request_id has 200": greedy(prompt="x", request_id="x" * 200),
            "prompt in characters is too long": greedy(prompt="x" * ((4 << 20) + 1)),
        }
        for words, request in invalid.items():
            assert words in await refused(stub.Generate(request), grpc.StatusCode.INVALID_ARGUMENT)
        assert "'other'" in await refused(stub.Generate(greedy(prompt="x", model="other")), grpc.StatusCode.NOT_FOUND)
        no_room = await refused(stub.Generate(greedy(prompt="x", max_tokens=60)), grpc.StatusCode.RESOURCE_EXHAUSTED)
        assert "KV cache" in no_room
        served.experts.fail_at[served.experts.calls + 4] = NodeUnavailable("b", "Node b is away; start it.")
        away = await refused(stub.Generate(greedy(prompt="x", max_tokens=9)), grpc.StatusCode.UNAVAILABLE)
        assert away == "Node b is away; start it."
        served.status = type(served.status)(ready=False, reason="Expert 3 of layer 1 has no node.")
        assert "Expert 3" in await refused(stub.Generate(greedy(prompt="x")), grpc.StatusCode.UNAVAILABLE)
        assert (await stub.Status(pb.StatusRequest())).reason == "Expert 3 of layer 1 has no node."

    with_door(served, use)


def test_an_unforeseen_error_is_logged_and_not_told(
    serve: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    served = serve()

    async def use(_: Any, stub: Any) -> None:
        served.experts.fail_at[0] = ZeroDivisionError("a secret detail")
        sentence = await refused(stub.Generate(greedy(prompt="x")), grpc.StatusCode.INTERNAL)
        assert "secret" not in sentence and "ZeroDivision" not in sentence
        replies = [reply async for reply in stub.Generate(greedy(prompt="x", max_tokens=2))]
        assert replies[-1].usage.completion_tokens == 2

    with caplog.at_level(logging.ERROR):
        with_door(served, use)
    assert "a secret detail" in caplog.text


def test_status_models_health_reflection(serve: Callable[..., Any]) -> None:
    served = serve()

    async def use(channel: Any, stub: Any) -> None:
        call = stub.Generate(greedy(prompt="x", max_tokens=100, ignore_eos=True))
        await call.read()
        status = await stub.Status(pb.StatusRequest())
        assert (status.model, status.ready, status.epoch, status.running) == ("fake-moe", True, 3, 1)
        assert [(node.name, node.state, node.experts_held) for node in status.nodes] == [("a", "ready", 7)]
        assert status.kv_bytes_used == 100 * 101 and status.kv_bytes_limit == 10_000_000
        assert status.version and status.uptime_seconds == 1.5
        call.cancel()
        (model,) = (await stub.Models(pb.ModelsRequest())).models
        assert (model.id, model.family, model.context_length, model.expert_bytes) == ("fake-moe", "fake", 4096, 1234)
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "moehive.inference.v1.Inference"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING

    with_door(served, use)


def test_what_status_says_arrives_and_is_shown(serve: Callable[..., Any]) -> None:
    """Every field of every node, through gRPC and the client, to `moehive status`."""
    served = serve()
    tiers = TierStatus(
        ram_bytes=3, disk_bytes=5, vram_bytes=7, hit_rate=0.75, foreseen_rate=0.125, disk_read_bytes=11
    )
    loading = NodeStatus(
        name="new", state="loading", address="host:1", experts_held=2, experts_assigned=9, bytes_held=4,
        ram_bytes=10**10, read_bandwidth=2e10, expert_calls=21, compute_ns=23, load=0.5, resident_bytes=25,
        load_progress=0.25, load_bytes=2 * 10**9, load_total_bytes=8 * 10**9, load_bytes_per_s=1.5e8,
        round_trip_s=0.001, link_bandwidth=1e8, products_per_s=3e11, token_products_per_s=2e11, tiers=tiers,
    )  # fmt: skip
    fault = "gave new wrong bytes of expert 3 of layer 1"
    liar = NodeStatus(name="liar", state="ready", source_fault=fault)
    served.status = ClusterStatus(ready=True, nodes=(loading, liar), cache_margin=0.3)
    shown: list[str] = []

    async def use(channel: Any, stub: Any) -> None:
        for options in ([], ["--json"]):
            command = ["status", "--address", f"127.0.0.1:{served.port}", *options]
            result = await asyncio.to_thread(CliRunner().invoke, app, command)
            assert result.exit_code == 0, result.output
            shown.append(result.stdout)

    with_door(served, use)
    words = " ".join(shown[0].split())
    for sentence in (
        "new has loaded 2.0 GB of 8.0 GB, 150 MB/s, 40 s left.",
        f"liar {fault}; they were fetched again from elsewhere.",
        "new: 5 B of experts on disk, 3 B in memory, 7 B on a GPU; 75% of those asked for were in memory, 12% thanks",
        "Cache-aware routing is on, margin 0.3",
    ):
        assert sentence in words
    found = json.loads(shown[1])
    assert found["nodes"] == [asdict(loading), asdict(liar)] and found["cache_margin"] == 0.3


def test_reflection(serve: Callable[..., Any]) -> None:
    async def run() -> None:
        door = await serve_grpc("127.0.0.1", 0, serve().service)

        def look() -> None:
            with grpc.insecure_channel(f"127.0.0.1:{door.port}") as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                assert "moehive.inference.v1.Inference" in database.get_services()
                service = DescriptorPool(database).FindServiceByName("moehive.inference.v1.Inference")
                assert {method.name for method in service.methods} == {"Generate", "Cancel", "Status", "Models"}

        await asyncio.to_thread(look)
        await door.stop(0)

    asyncio.run(run())


def test_shutdown_ends_streams(serve: Callable[..., Any]) -> None:
    served = serve()

    async def use(_: Any, stub: Any) -> None:
        call = stub.Generate(greedy(prompt="x", ignore_eos=True))
        await call.read()
        await served.engine.shutdown()
        assert "stopping" in await refused(call, grpc.StatusCode.UNAVAILABLE)

    with_door(served, use)


def test_keys(serve: Callable[..., Any]) -> None:
    served = serve(says="yes")

    async def use(channel: Any, stub: Any) -> None:
        key = (("authorization", "Bearer right"),)
        for metadata in ((), (("authorization", "Bearer wrong"),), (("authorization", "right"),)):
            for call in (
                stub.Generate(greedy(prompt="x"), metadata=metadata),
                stub.Status(pb.StatusRequest(), metadata=metadata),
            ):
                assert "API key" in await refused(call, grpc.StatusCode.UNAUTHENTICATED)
        replies = [reply async for reply in stub.Generate(greedy(prompt="x"), metadata=key)]
        assert "".join(reply.text for reply in replies) == "yes"
        assert (await stub.Models(pb.ModelsRequest(), metadata=key)).models
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

    with_door(served, use, check_key=lambda key: key == "right")


def test_doors_that_must_not_open(serve: Callable[..., Any]) -> None:
    async def run() -> None:
        service = serve().service
        with pytest.raises(CoordinatorError, match=r"0\.0\.0\.0 .* TLS and API keys are missing"):
            await serve_grpc("0.0.0.0", 0, service)
        with pytest.raises(CoordinatorError, match=r"TLS are missing|TLS"):
            await serve_grpc("::", 0, service, check_key=lambda _: True)
        door = await serve_grpc("127.0.0.1", 0, service)
        with pytest.raises(OSError, match="port is in use"):
            await serve_grpc("127.0.0.1", door.port, service)
        await door.stop(0)

    asyncio.run(run())


METHODS = {
    "Generate": pb.GenerateRequest,
    "Cancel": pb.CancelRequest,
    "Status": pb.StatusRequest,
    "Models": pb.ModelsRequest,
}
MESSAGES = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda n: b"\x00" * n, st.sampled_from([1 << 20, (16 << 20) + 1, 20 << 20])),
    st.builds(
        lambda text, ids, cut, flip: _damaged(text, ids, cut, flip),
        st.text(max_size=40),
        st.lists(st.integers(0, (1 << 32) - 1), max_size=20),
        st.floats(0, 1),
        st.integers(0, 1 << 16),
    ),
)


def _damaged(text: str, ids: list[int], cut: float, flip: int) -> bytes:
    """A real request, cut short, with one byte changed."""
    request = pb.GenerateRequest(
        request_id=text[:10], stop=[text, "b"], max_tokens=3, sampling=pb.SamplingParameters(temperature=2, top_p=0.5)
    )
    if ids:
        request.tokens.ids.extend(ids)
    else:
        request.prompt = text
    whole = bytearray(request.SerializeToString())
    whole[flip % len(whole)] ^= 1 << (flip % 8)
    return bytes(whole[: int(len(whole) * cut) + 1])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_random_oversized_and_truncated_messages(method: str, serve: Callable[..., Any]) -> None:
    served = serve(context_length=64)
    allowed = {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }

    async def use(channel: Any, stub: Any) -> None:
        loop = asyncio.get_running_loop()

        async def send(message: bytes) -> None:
            path = f"/moehive.inference.v1.Inference/{method}"
            kind = channel.unary_stream if method == "Generate" else channel.unary_unary
            call = kind(path, request_serializer=None, response_deserializer=None)(message, timeout=30)
            with suppress(grpc.aio.AioRpcError):
                if method == "Generate":
                    _ = [reply async for reply in call]
                else:
                    await call
            code = await call.code()
            assert code in allowed, (method, message[:100], code, await call.details())

        @settings(max_examples=FUZZ_EXAMPLES)
        @given(MESSAGES)
        def fuzz(message: bytes) -> None:
            asyncio.run_coroutine_threadsafe(send(message), loop).result(60)

        process = psutil.Process()
        await send(b"\x00" * (20 << 20))  # what such a message takes once
        before = process.memory_info().rss
        await asyncio.to_thread(fuzz)
        assert process.memory_info().rss - before < 200 << 20, "the messages are kept"
        assert (await stub.Status(pb.StatusRequest())).model == "fake-moe", "the server is still there"

    with_door(served, use)
