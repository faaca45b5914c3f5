"""An expert's bytes as the chunks of FetchSlice, and back; coordinator and nodes both send and receive them.

Chunks carry no hash of their own: TLS notices what a network damages, and the whole expert is checked by its hash
before it is used. A chunk's data is not handed to protobuf, which copies it twice on each side: it is sent from where
it lies, behind the other fields in the same wire format, and read where it was received.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import NamedTuple

import zstandard
from google.protobuf.message import DecodeError

from . import cluster_pb2 as pb
from .bounds import MAX_CHUNK_BYTES, BoundsError, check_chunk
from .fields import find_field
from .varint import varint
from .wire.messages import Buffer

WORTH = 0.95  # a sample that zstd does not make smaller than this share of it is sent as it is
_LEVEL = 1  # some 500 MB/s on one core, several times a home network
_SAMPLE_BYTES = 32 << 10  # of each of four places
_SAMPLES = 4

_DATA_TAG = bytes([pb.SliceChunk.DATA_FIELD_NUMBER << 3 | 2])
MOST_BYTES = MAX_CHUNK_BYTES + 1024  # of a message
_AHEAD_BYTES = 4 * MAX_CHUNK_BYTES  # compressed in one go by a thread, which is quicker than one by one


class Message(NamedTuple):
    """A serialized SliceChunk, in pieces that are sent one after the other: its other fields, its data."""

    head: bytes
    data: memoryview


class Chunk(NamedTuple):
    """A chunk that was received and is within its bounds."""

    head: pb.SliceChunk  # all but its data
    data: memoryview  # as it travelled


def worth_compressing(data: memoryview) -> bool:
    """Whether samples of `data` (bytes, any length) shrink by more than 5 %."""
    step = max(1, len(data) // _SAMPLES)
    sample = b"".join(data[at : at + _SAMPLE_BYTES] for at in range(0, len(data), step))
    return len(zstandard.ZstdCompressor(level=_LEVEL).compress(sample)) < WORTH * len(sample)


async def expert_chunks(
    expert: tuple[int, int], data: memoryview, offset: int, digest: bytes, zstd: bool
) -> AsyncGenerator[Message]:
    """An expert (layer, number) whose bytes are `data`, from `offset` on, as SliceChunks; one, empty, of none.

    With `zstd` they are compressed, in a thread; else none of the bytes is touched.
    """
    for span in spans(offset, len(data), _AHEAD_BYTES):
        made = make_chunks(expert, data, span, digest, zstd)
        for chunk in await asyncio.to_thread(list, made) if zstd else made:
            yield chunk


def make_chunks(
    expert: tuple[int, int], data: memoryview, span: tuple[int, int], digest: bytes, zstd: bool
) -> Iterator[Message]:
    """Bytes [start, end) of an expert (layer, number) whose bytes are `data`, as SliceChunks; one, empty, of none."""
    start, end = span
    starts = range(start, end, MAX_CHUNK_BYTES) or (start,)
    return (_chunk(expert, data, at, min(at + MAX_CHUNK_BYTES, end), digest, zstd) for at in starts)


def spans(offset: int, nbytes: int, most: int) -> Iterator[tuple[int, int]]:
    """[offset, nbytes) in pieces of at most `most` bytes; one, empty, when there is nothing left."""
    for start in range(offset, nbytes, most) or (offset,):
        yield start, min(start + most, nbytes)


def read_chunk(message: Buffer) -> Chunk:
    """A serialized SliceChunk. Raises BoundsError for what is none, or is out of its bounds."""
    if len(message) > MOST_BYTES:
        raise BoundsError(f"A chunk has at most {MAX_CHUNK_BYTES} bytes.")
    place = find_field(message, pb.SliceChunk.DATA_FIELD_NUMBER)
    if place is None:
        raise BoundsError("A chunk is not valid protobuf, or has data twice.")
    view = memoryview(message)
    try:
        head = pb.SliceChunk.FromString(b"".join((view[: place.start], view[place.end :])))
    except DecodeError as error:
        raise BoundsError("A chunk is not valid protobuf.") from error
    check_chunk(head, place.end - place.content)
    return Chunk(head, view[place.content : place.end])


def chunk_data(chunk: Chunk) -> memoryview:
    """The expert's bytes in a chunk. Raises BoundsError for one that does not decompress to what it names."""
    named = chunk.head.zstd_bytes
    if not named:
        return chunk.data
    try:
        # The frame's own word on its size is what the decompressor would allocate.
        if zstandard.get_frame_parameters(chunk.data).content_size != named:
            raise BoundsError("A compressed chunk is not of the size that it names.")
        return memoryview(zstandard.ZstdDecompressor(max_window_size=2 * MAX_CHUNK_BYTES).decompress(chunk.data))
    except zstandard.ZstdError as error:
        raise BoundsError("A compressed chunk does not decompress.") from error


def _chunk(expert: tuple[int, int], whole: memoryview, start: int, end: int, digest: bytes, zstd: bool) -> Message:
    data, zstd_bytes = whole[start:end], 0
    if zstd and data:
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        if len(packed) < len(data):
            data, zstd_bytes = memoryview(packed), len(data)
    head = pb.SliceChunk(
        layer=expert[0],
        expert=expert[1],
        offset=start,
        total_bytes=len(whole),
        zstd_bytes=zstd_bytes,
        expert_digest=digest if end == len(whole) else b"",
    )
    return Message(head.SerializeToString() + _DATA_TAG + varint(len(data)), data)
