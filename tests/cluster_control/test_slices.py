"""Slices over mutual TLS: every byte and hash, resumption, and what is not given out."""

import asyncio
import threading

import grpc
import grpc.aio
import pytest
import torch

from moehive.coordinator.checkpoints.slices import SliceSource
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.digest import digest_of
from moehive.kernels.geometry import ExpertId, ExpertSpec, LayerGeometry, Manifest
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_CHUNK_BYTES, check_chunk
from moehive.proto.chunks import read_chunk
from moehive.proto.handshake import metadata

# 3 * 1024 * 512 * 2 bytes: three chunks exactly; and one of 3 * 64 * 2048 * 4: one and a half.
BIG = ExpertSpec(hidden_size=1024, intermediate_size=512, activation="silu", format="bf16")
ODD = ExpertSpec(hidden_size=64, intermediate_size=2048, activation="silu", format="f32")
LARGE = Manifest("large", "ef" * 32, (LayerGeometry(4, 2, BIG), LayerGeometry(3, 2, ODD)))


def request_for(manifest, *wanted):
    experts = [pb.ExpertWanted(layer=x, expert=e, offset=offset) for (x, e, offset) in wanted]
    return pb.SliceRequest(fingerprint=manifest.fingerprint, experts=experts)


async def fetch(node, request):
    """The bytes of each expert, each chunk within its bounds."""
    got: dict[tuple[int, int], bytes] = {}
    digests = {}
    async for chunk in node.stub.FetchSlice(request, metadata=metadata()):
        check_chunk(chunk, len(chunk.data))
        key = (chunk.layer, chunk.expert)
        started = next(w.offset for w in request.experts if (w.layer, w.expert) == key)
        assert chunk.offset == started + len(got.get(key, b""))
        got[key] = got.get(key, b"") + chunk.data
        if chunk.expert_digest:
            digests[key] = chunk.expert_digest
    assert list(got) == [(w.layer, w.expert) for w in request.experts]
    assert set(digests) == set(got)
    return got, digests


def test_a_slice_arrives_whole_in_the_order_asked_for(cluster, blob):
    async def main():
        async with cluster(manifest=LARGE) as harness:
            node = await harness.join("attic")
            wanted = [(1, 2, 0), (0, 3, 0), (1, 0, 0), (0, 0, 0)]
            got, digests = await fetch(node, request_for(LARGE, *wanted))
            for (layer, expert), data in got.items():
                whole = blob(ExpertId(layer, expert), LARGE).numpy().tobytes()
                assert data == whole
                assert digests[layer, expert] == digest_of(whole)

    asyncio.run(main())


@pytest.mark.parametrize("offset", [1, MAX_CHUNK_BYTES, MAX_CHUNK_BYTES + 7, ODD.nbytes - 1, ODD.nbytes])
def test_a_cut_slice_goes_on_where_it_was_cut(cluster, blob, offset):
    async def main():
        async with cluster(manifest=LARGE) as harness:
            node = await harness.join("attic")
            whole = blob(ExpertId(1, 1), LARGE).numpy().tobytes()
            got, digests = await fetch(node, request_for(LARGE, (1, 1, offset), (1, 2, 0)))
            assert got[1, 1] == whole[offset:]
            assert digests[1, 1] == digest_of(whole)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("wrong", "code", "sentence"),
    [
        ({"fingerprint": "0" * 64}, grpc.StatusCode.FAILED_PRECONDITION, "asks for model 000000000000"),
        ({"fingerprint": "short"}, grpc.StatusCode.INVALID_ARGUMENT, "64 hexadecimal digits"),
        ({"experts": []}, grpc.StatusCode.INVALID_ARGUMENT, "1 to 65536"),
        ({"experts": [(2, 0, 0)]}, grpc.StatusCode.INVALID_ARGUMENT, "no expert 0 in MoE layer 2"),
        ({"experts": [(0, 0, 0), (0, 4, 0)]}, grpc.StatusCode.INVALID_ARGUMENT, "no expert 4 in MoE layer 0"),
        ({"experts": [(0, 0, BIG.nbytes + 1)]}, grpc.StatusCode.INVALID_ARGUMENT, f"has {BIG.nbytes} bytes"),
    ],
)
def test_what_is_not_given_out(cluster, wrong, code, sentence):
    async def main():
        async with cluster(manifest=LARGE) as harness:
            node = await harness.join("attic")
            request = request_for(LARGE, *wrong.get("experts", [(0, 0, 0)]))
            request.fingerprint = wrong.get("fingerprint", LARGE.fingerprint)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fetch(node, request)
            assert caught.value.code() == code
            assert sentence in caught.value.details()

    asyncio.run(main())


def test_an_expert_that_cannot_be_read_is_not_asked_for_again_at_once(cluster):
    """The node reports it, so that whoever looks at the coordinator sees why nothing is ready."""

    def damaged(expert):
        raise CoordinatorError(f"Expert {expert.expert} is damaged.")

    async def main():
        async with cluster(manifest=LARGE, read=damaged) as harness:
            node = await harness.join("attic")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await fetch(node, request_for(LARGE, (1, 2, 0)))
            assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION  # the node's download ends on it
            assert caught.value.details() == "Expert 2 is damaged."

    asyncio.run(main())


def test_few_blobs_are_in_memory_however_many_nodes_fetch():
    spec = ExpertSpec(hidden_size=8192, intermediate_size=8192, activation="silu", format="bf16")  # 403 MB each
    manifest = Manifest("huge", "ef" * 32, (LayerGeometry(8, 2, spec),))
    reading = 0
    most = 0
    lock = threading.Lock()
    two, go_on = threading.Event(), threading.Event()

    def blob(expert):
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
            if reading == 2:
                two.set()
        go_on.wait(20.0)
        return torch.zeros(10, dtype=torch.uint8)

    async def main():
        nonlocal reading
        source = SliceSource(manifest, blob)

        async def one(expert):
            nonlocal reading
            async for message in source.stream(request_for(manifest, (0, expert, 0))):
                assert read_chunk(b"".join(message)).head.expert_digest
                with lock:
                    reading -= 1

        tasks = [asyncio.create_task(one(expert)) for expert in range(8)]
        assert await asyncio.to_thread(two.wait, 20.0)
        go_on.set()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert most == 2


def test_a_node_that_hangs_up_gives_its_place_back(cluster):
    async def main():
        async with cluster(manifest=LARGE) as harness:
            node = await harness.join("attic")
            harness.server._slices._slots = asyncio.Semaphore(1)
            everything = [(0, e, 0) for e in range(4)] * 8
            for _ in range(3):
                call = node.stub.FetchSlice(request_for(LARGE, *everything), metadata=metadata())
                await call.read()
                call.cancel()
            async with asyncio.timeout(20.0):
                await fetch(node, request_for(LARGE, (0, 1, 0)))

    asyncio.run(main())
