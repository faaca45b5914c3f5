"""The node's process against the real coordinator's cluster server, over mutual TLS on loopback."""

import asyncio
import signal
import socket
import stat
from pathlib import Path

import pytest
import torch

from moehive.coordinator.types import NodeName
from moehive.proto.tensors import Reply, read_values

A = NodeName("a")


def cached(state: Path) -> list[Path]:
    return sorted(state.glob("cache/*/*.expert"))


def test_joins_serves_and_leaves(tmp_path, coordinator_class, authority, model, start_node, make_request):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        node = start_node("--token", coordinator.token(), "--name", "a")
        await coordinator.until_ready()
        epoch = coordinator.membership.state.epoch

        request, hidden, routing = make_request(64, [0, 3, 5], tokens=3, layer=1, epoch=epoch)
        reply = await coordinator.compute(request)
        values = read_values(Reply(reply, reply.values), 3, 64, torch.float32)
        torch.testing.assert_close(values, model.sums(1, hidden, routing), rtol=1e-4, atol=1e-5)
        assert reply.id == request.id and reply.compute_ns > 0

        await coordinator.until(lambda state: state.nodes[A].figures.calls == 1)
        figures = coordinator.membership.state.nodes[A].figures
        assert figures.experts_held == 12 and figures.expert_calls == 6
        assert figures.bytes_held == model.manifest.total_bytes and figures.resident_bytes > figures.bytes_held
        capacity = coordinator.membership.state.nodes[A].capacity
        assert capacity.ram_bytes == 64 << 20 and capacity.threads == 1
        assert min(capacity.read_bandwidth, capacity.products_per_s, capacity.token_products_per_s) > 1e8
        assert stat.S_IMODE((tmp_path / "a/identity/key.pem").stat().st_mode) == 0o600

        node.signal(signal.SIGTERM)
        assert await node.wait() == 0
        assert "Traceback" not in node.text and "released" in node.text
        await coordinator.stop()

    asyncio.run(main())


def test_sigkill_and_restart_rejoin_from_the_cache(tmp_path, coordinator_class, authority, model, start_node):
    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        node = start_node("--token", coordinator.token(), "--name", "a")
        await coordinator.until_ready()
        node.signal(signal.SIGKILL)
        await node.wait()
        await coordinator.until(lambda state: not state.nodes[A].present)
        coordinator.slices.requests.clear()

        again = start_node()  # no token
        await coordinator.until_ready()
        assert coordinator.slices.requests == []
        again.signal(signal.SIGKILL)
        await again.wait()
        await coordinator.until(lambda state: not state.nodes[A].present)

        # One damaged file is fetched again, and only that one.
        victim = cached(tmp_path / "a")[3]
        damaged = bytearray(victim.read_bytes())
        damaged[100] ^= 1
        victim.write_bytes(damaged)
        last = start_node("--token", coordinator.token())  # a member needs none: it is not used
        await coordinator.until_ready()
        (request,) = coordinator.slices.requests
        assert [(e.layer, e.expert, e.offset) for e in request.experts] == [(0, 3, 0)]
        assert len(cached(tmp_path / "a")) == 12
        assert "is damaged" in last.text and "was not used" in last.text
        await coordinator.stop()

    asyncio.run(main())


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_ended_in_mid_fetch_resumes_after_restart(
    number, tmp_path, coordinator_class, authority, model_class, start_node, monkeypatch, eventually
):
    from moehive.kernels.geometry import ExpertSpec
    from moehive.proto import chunks

    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4096)
    spec = ExpertSpec(hidden_size=64, intermediate_size=48, activation="silu", format="f32")
    model = model_class.random(spec, layers=1, experts=2)
    state = tmp_path / "a"

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        reached, go_on = asyncio.Event(), asyncio.Event()
        stream = coordinator.slices.stream

        async def hang(request):
            coordinator.slices.stream = stream
            sent = 0
            async for chunk in stream(request):
                yield chunk
                sent += 1
                if sent == 12:
                    reached.set()
                    await go_on.wait()

        coordinator.slices.stream = hang
        node = start_node("--token", coordinator.token(), "--name", "a")
        await asyncio.wait_for(reached.wait(), 60)
        await eventually(lambda: [p for p in state.glob("cache/*/0-1.part") if p.stat().st_size >= 3 * 4096])
        (part,) = state.glob("cache/*/0-1.part")
        before = len(node.text)
        node.signal(number)
        code = await node.wait()
        go_on.set()
        if number == signal.SIGINT:
            assert code == 0
            said = node.text[before:].splitlines()  # that it leaves; no warning, no traceback
            assert said[0] == "I Leaving the cluster." and all(line.startswith("I ") for line in said), said
            offset = part.stat().st_size
            assert offset >= 3 * 4096
        else:
            offset = 2 * 4096 + 100
            with part.open("r+b") as file:  # the power went off: the last bytes did not reach the disk
                file.truncate(offset)
        coordinator.slices.requests.clear()
        start_node()
        await coordinator.until_ready()
        (request,) = coordinator.slices.requests
        assert [(e.expert, e.offset) for e in request.experts] == [(1, offset)]
        await coordinator.stop()

    asyncio.run(main())


def test_a_node_that_leaves_serves_until_replaced(
    tmp_path, coordinator_class, authority, model, start_node, make_request
):
    """With two nodes, one that leaves goes on serving until the other has its experts."""

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority, min_nodes=2)
        first = start_node("--token", coordinator.token(), "--name", "a")
        start_node("--token", coordinator.token(), "--name", "b", state="b")
        await coordinator.until_ready()
        first.signal(signal.SIGTERM)
        assert await first.wait() == 0
        await coordinator.until_ready()
        assert set(coordinator.membership.state.active_owners) == {"b"}
        request, _, _ = make_request(64, list(range(6)), tokens=6, epoch=coordinator.membership.state.epoch)
        reply = await coordinator.compute(request, "b")
        assert not reply.HasField("refusal") and reply.rows == 6
        await coordinator.stop()

    asyncio.run(main())


def test_systemd_is_told(tmp_path, coordinator_class, authority, model, start_node):
    """READY once the slice is held, the watchdog is fed, STOPPING at the end."""

    async def main():
        coordinator = await coordinator_class.start(tmp_path / "c", model, authority)
        (tmp_path / "credentials").mkdir()
        (tmp_path / "credentials/token").write_text(coordinator.token())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(str(tmp_path / "notify"))
            manager.settimeout(60)
            node = start_node(
                "--name", "a",
                NOTIFY_SOCKET=str(tmp_path / "notify"),
                WATCHDOG_USEC="100000",
                CREDENTIALS_DIRECTORY=str(tmp_path / "credentials"),
            )  # fmt: skip
            said: list[str] = []

            def listen(until):
                while until not in said:
                    said.extend(manager.recv(4096).decode().splitlines())

            await asyncio.to_thread(listen, "READY=1")
            assert said[said.index("READY=1") + 1].startswith("STATUS=Serving 12 experts")
            await coordinator.until_ready()
            said.clear()
            await asyncio.to_thread(listen, "WATCHDOG=1")
            node.signal(signal.SIGTERM)
            await asyncio.to_thread(listen, "STOPPING=1")
            assert await node.wait() == 0
        await coordinator.stop()

    asyncio.run(main())
