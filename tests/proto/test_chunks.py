"""Chunks of an expert: what is sent is what is read, compressed only where that pays; hostile frames are refused."""

import contextlib
import os

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moehive.kernels.digest import digest_of
from moehive.proto import cluster_pb2 as pb
from moehive.proto.bounds import MAX_CHUNK_BYTES, BoundsError
from moehive.proto.chunks import chunk_data, make_chunks, read_chunk, spans, worth_compressing


@settings(max_examples=60, deadline=None)
@given(
    data=st.binary(max_size=3000) | st.integers(0, 5000).map(bytes),
    cut=st.floats(0, 1),
    most=st.integers(1, 4000),
    zstd=st.booleans(),
)
def test_what_is_sent_is_what_is_read(data, cut, most, zstd):
    offset = int(cut * len(data))
    digest = digest_of(data)
    sent = [
        (read_chunk(b"".join(message)), len(message.data), pb.SliceChunk.FromString(b"".join(message)))
        for span in spans(offset, len(data), most)
        for message in make_chunks((3, 5), memoryview(data), span, digest, zstd)
    ]
    got = b""
    for chunk, nbytes, whole in sent:
        head = chunk.head
        assert (head.layer, head.expert, head.offset, head.total_bytes) == (3, 5, offset + len(got), len(data))
        assert len(chunk.data) == nbytes <= max(1, head.zstd_bytes or nbytes)
        got += chunk_data(chunk)
        head.data = bytes(chunk.data)
        assert head == whole  # as protobuf reads it
        assert read_chunk(whole.SerializeToString()).data == chunk.data  # as protobuf writes it
    assert got == data[offset:]
    assert [whole.expert_digest for _, _, whole in sent] == [b""] * (len(sent) - 1) + [digest_of(data)]


def test_random_bytes_are_not_compressed_and_others_are():
    noise = os.urandom(1 << 20)
    assert not worth_compressing(memoryview(noise))
    assert worth_compressing(memoryview(bytes(1 << 20)))
    assert not worth_compressing(memoryview(noise[: 1 << 19] + noise[: 1 << 19][::-1]))
    tenth = bytearray(noise)
    tenth[::10] = bytes(len(tenth[::10]))  # a tenth less to say, which zstd sees in part
    assert worth_compressing(memoryview(tenth)) == (
        len(zstandard.ZstdCompressor(level=1).compress(bytes(tenth))) < 0.95 * len(tenth)
    )
    (message,) = make_chunks((0, 0), memoryview(noise), (0, 1000), bytes(32), True)
    chunk = read_chunk(b"".join(message))
    assert chunk.head.zstd_bytes == 0 and chunk.data == noise[:1000]  # it would have grown


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (zstandard.ZstdCompressor().compress(bytes(100)), 99),
        (zstandard.ZstdCompressor().compress(bytes(1 << 24)), MAX_CHUNK_BYTES),
        (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(100)), 100),
        (zstandard.ZstdCompressor().compress(os.urandom(100))[:-1], 100),
        (b"", 100),
        (b"no frame", 100),
    ],
)
def test_hostile_frames_are_refused(data, named):
    chunk = read_chunk(pb.SliceChunk(total_bytes=1 << 30, data=data, zstd_bytes=named).SerializeToString())
    assert chunk.data == data
    with pytest.raises(BoundsError):
        chunk_data(chunk)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(1, MAX_CHUNK_BYTES))
def test_any_bytes_give_the_named_size_or_our_error(data, named):
    for payload in (data, zstandard.ZstdCompressor().compress(data)[:-3] + data):
        with contextlib.suppress(BoundsError):
            message = pb.SliceChunk(data=payload, zstd_bytes=named, total_bytes=1 << 40).SerializeToString()
            assert len(chunk_data(read_chunk(message))) == named


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 120))
def test_a_message_of_any_bytes_is_a_chunk_or_our_error(noise, start, end):
    message = b"".join(*make_chunks((3, 5), memoryview(bytes(100)), (50, 100), bytes(32), False))
    for hostile in (noise, message[:start] + noise + message[end:]):
        with contextlib.suppress(BoundsError):
            chunk = read_chunk(hostile)
            assert not chunk.head.data and len(chunk.data) <= len(hostile)


def test_data_twice_and_endless_messages_are_refused():
    once = pb.SliceChunk(total_bytes=9, data=b"x").SerializeToString()
    for hostile in (once + once, b"\x08\x01" * 20, once + bytes(MAX_CHUNK_BYTES + 2048), b"\x2a\xff\xff\xff\x7fx"):
        with pytest.raises(BoundsError):
            read_chunk(hostile)


@pytest.mark.parametrize(
    "wrong",
    [
        {"data": bytes(MAX_CHUNK_BYTES + 1), "total_bytes": 1 << 30},
        {"data": bytes(8), "zstd_bytes": MAX_CHUNK_BYTES + 1, "total_bytes": 1 << 30},
        {"data": bytes(8), "total_bytes": 7},
        {"data": bytes(8), "zstd_bytes": 9, "total_bytes": 8},
        {"data": bytes(8), "total_bytes": 8},
        {"data": bytes(8), "total_bytes": 9, "expert_digest": bytes(32)},
        {"data": bytes(8), "total_bytes": 8, "expert_digest": bytes(31)},
        {"data": bytes(8), "total_bytes": 1 << 62},
    ],
)
def test_chunks_out_of_bounds(wrong):
    with pytest.raises(BoundsError):
        read_chunk(pb.SliceChunk(**wrong).SerializeToString())
