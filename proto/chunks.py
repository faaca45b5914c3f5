"""An expert's bytes as the chunks of FetchSlice, and back; coordinator and nodes both send and receive them.

Chunks carry no hash of their own: TLS notices what a network damages, and the whole expert is checked by its hash
before it is used.
"""

from collections.abc import Iterator

import zstandard

from . import cluster_pb2 as pb
from .bounds import MAX_CHUNK_BYTES, BoundsError, check_chunk

WORTH = 0.95  # a sample that zstd does not make smaller than this share of it is sent as it is
_LEVEL = 1  # some 500 MB/s on one core, several times a home network
_SAMPLE_BYTES = 32 << 10  # of each of four places
_SAMPLES = 4


def worth_compressing(data: memoryview) -> bool:
    """Whether samples of `data` (bytes, any length) shrink by more than 5 %."""
    step = max(1, len(data) // _SAMPLES)
    sample = b"".join(data[at : at + _SAMPLE_BYTES] for at in range(0, len(data), step))
    return len(zstandard.ZstdCompressor(level=_LEVEL).compress(sample)) < WORTH * len(sample)


def make_chunks(
    expert: tuple[int, int], data: memoryview, span: tuple[int, int], digest: bytes, zstd: bool
) -> list[tuple[pb.SliceChunk, int]]:
    """The chunks of bytes [start, end) of an expert (layer, number) whose bytes are `data`; one, empty, of none.

    Each comes with the bytes that it sends.
    """
    start, end = span
    starts = range(start, end, MAX_CHUNK_BYTES) or (start,)
    return [_chunk(expert, data, at, min(at + MAX_CHUNK_BYTES, end), digest, zstd) for at in starts]


def spans(offset: int, nbytes: int, most: int) -> Iterator[tuple[int, int]]:
    """[offset, nbytes) in pieces of at most `most` bytes; one, empty, when there is nothing left."""
    for start in range(offset, nbytes, most) or (offset,):
        yield start, min(start + most, nbytes)


def chunk_data(chunk: pb.SliceChunk) -> bytes:
    """The expert's bytes in a chunk. Raises BoundsError for one out of its bounds, or that does not decompress."""
    data = check_chunk(chunk)
    if not chunk.zstd_bytes:
        return data
    try:
        # The frame's own word on its size is what the decompressor would allocate.
        if zstandard.get_frame_parameters(data).content_size != chunk.zstd_bytes:
            raise BoundsError("A compressed chunk is not of the size that it names.")
        return zstandard.ZstdDecompressor(max_window_size=2 * MAX_CHUNK_BYTES).decompress(data)
    except zstandard.ZstdError as error:
        raise BoundsError("A compressed chunk does not decompress.") from error


def _chunk(
    expert: tuple[int, int], whole: memoryview, start: int, end: int, digest: bytes, zstd: bool
) -> tuple[pb.SliceChunk, int]:
    data, zstd_bytes = bytes(whole[start:end]), 0
    if zstd and data:
        packed = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
        if len(packed) < len(data):
            data, zstd_bytes = packed, len(data)
    chunk = pb.SliceChunk(
        layer=expert[0],
        expert=expert[1],
        offset=start,
        total_bytes=len(whole),
        data=data,
        zstd_bytes=zstd_bytes,
        expert_digest=digest if end == len(whole) else b"",
    )
    return chunk, len(data)
