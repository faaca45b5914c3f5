"""The public doors of a real coordinator: open on loopback, elsewhere TLS and API keys; the real OpenAI client."""

import asyncio
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from moehive.client import Client, MoehiveError
from moehive.coordinator.cluster.keys import create_key
from moehive.coordinator.cluster.store import Store
from moehive.coordinator.types import CoordinatorError

PROMPT = [3, 17, 5, 99]


def test_openai_client_gets_what_the_grpc_client_gets(
    cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    async def run() -> tuple[Any, Any, list[str]]:
        async with cluster.coordinator(checkpoint("mixtral"), nodes=2) as coordinator:
            grpc = await ask(coordinator, lambda c: c.generate(token_ids=PROMPT, max_tokens=8, temperature=0))
            async with openai.AsyncOpenAI(
                base_url=f"http://127.0.0.1:{coordinator.http_port}/v1", api_key="unused", max_retries=0
            ) as client:
                models = [model.id async for model in client.models.list()]
                http = await client.completions.create(
                    model=models[0], prompt=PROMPT, max_tokens=8, temperature=0, logprobs=1
                )
            return grpc, http, models

    grpc, http, models = asyncio.run(run())
    assert models == ["mixtral"]
    assert http.usage is not None
    assert (http.usage.prompt_tokens, http.usage.completion_tokens) == (len(PROMPT), len(grpc.token_ids))


def test_an_address_that_others_reach_needs_tls_and_a_key(
    new_cluster: Any, checkpoint: Callable[[str], Path], ask: Callable[..., Any]
) -> None:
    made = new_cluster()
    folder = checkpoint("mixtral")

    async def run() -> None:
        with pytest.raises(CoordinatorError, match="moehive key new"):
            async with made.coordinator(folder, nodes=1, host="0.0.0.0"):
                pass
        store = Store(made.state / "coordinator.sqlite")
        _, key = create_key(store, "test")
        store.close()
        ca = made.state / "ca" / "ca.crt"
        async with made.coordinator(folder, nodes=1, host="0.0.0.0") as coordinator:

            def call(api_key: str | None, ca_file: Path | None) -> list[int]:
                with Client(f"127.0.0.1:{coordinator.grpc_port}", api_key=api_key, ca_file=ca_file) as client:
                    return list(client.generate(token_ids=PROMPT, max_tokens=4, temperature=0).token_ids)

            assert await asyncio.to_thread(call, key, ca)
            with pytest.raises(MoehiveError) as caught:
                await asyncio.to_thread(call, "mhk-wrong", ca)
            assert caught.value.code == "UNAUTHENTICATED"
            url = f"https://127.0.0.1:{coordinator.http_port}/v1/models"
            async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(ca))) as web:
                assert (await web.get(url)).status_code == 401
                assert (await web.get(url, headers={"authorization": f"Bearer {key}"})).status_code == 200

    asyncio.run(run())
