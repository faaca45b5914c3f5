"""What a fetch is held against: a plain copy, a disk, and the processor time that its unavoidable work takes.

The work is measured part by part, each alone on one thread, in seconds of a processor (user and system) for 1 GB:
that says more of a machine that does other things than a rate does.
"""

import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from time import perf_counter, thread_time
from typing import NamedTuple

import torch
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moehive.kernels.digest import digest_of
from moehive.proto.bounds import MAX_CHUNK_BYTES

_COPY_BYTES = 1 << 30
_PART_BYTES = 256 << 20
_BUFFER_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_RECORD_BYTES = 16 << 10


class Copy(NamedTuple):
    """A plain TCP connection over loopback, from memory to memory, sender and receiver at once."""

    bytes_per_s: float
    cpu_s_per_gb: float  # of both


def tcp_copy() -> Copy:
    """Measures one of 1 GiB."""
    spent: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def send() -> None:
            data = memoryview(os.urandom(_BUFFER_BYTES))
            with socket.create_connection(("127.0.0.1", port)) as sending:
                ready.recv(1)
                begin = thread_time()
                for _ in range(_COPY_BYTES // len(data)):
                    sending.sendall(data)
                spent.append(thread_time() - begin)

        go, ready = socket.socketpair()  # data are sent once the receiver's buffer is there
        with go, ready:
            thread = Thread(target=send)
            thread.start()
            receiving, _ = listener.accept()
            with receiving:
                buffer = memoryview(bytearray(1 << 20))
                go.send(b"g")
                start, begin, done = perf_counter(), thread_time(), 0
                while count := receiving.recv_into(buffer):
                    done += count
                seconds = perf_counter() - start
                spent.append(thread_time() - begin)
            thread.join()
    return Copy(done / seconds, sum(spent) / done * 1e9)


def unavoidable_work(folder: Path) -> dict[str, float]:
    """Seconds of a processor for 1 GB of experts, part by part, besides the plain copy; files go to `folder`."""
    data = memoryview(os.urandom(_BUFFER_BYTES))
    chunks = [data[at : at + MAX_CHUNK_BYTES] for at in range(0, len(data), MAX_CHUNK_BYTES)]
    path = folder / "part"
    try:
        encrypt, decrypt = _cipher_seconds(chunks)
        return {
            "hash_s_per_gb": _seconds(lambda: digest_of(data), len(data)),
            "encrypt_s_per_gb": encrypt,
            "decrypt_s_per_gb": decrypt,
            "page_cache_s_per_gb": _seconds(lambda: _write(path, chunks), _PART_BYTES),
            "map_s_per_gb": _seconds(lambda: _map(path), _PART_BYTES),
        }
    finally:
        path.unlink(missing_ok=True)


def _seconds(work: Callable[[], object], nbytes: int) -> float:
    begin = thread_time()
    work()
    return (thread_time() - begin) / nbytes * 1e9


def _cipher_seconds(chunks: Sequence[memoryview]) -> tuple[float, float]:
    """Of encrypting and of decrypting as TLS 1.3 does: AES-256-GCM, in records of 16 KiB."""
    cipher, nonce = AESGCM(AESGCM.generate_key(256)), bytes(12)
    encrypting = decrypting = 0.0
    for chunk in chunks:
        begin = thread_time()
        records = [
            cipher.encrypt(nonce, chunk[at : at + _RECORD_BYTES], None) for at in range(0, len(chunk), _RECORD_BYTES)
        ]
        encrypting += thread_time() - begin
        begin = thread_time()
        for record in records:
            cipher.decrypt(nonce, record, None)
        decrypting += thread_time() - begin
    total = sum(map(len, chunks))
    return encrypting / total * 1e9, decrypting / total * 1e9


def _write(path: Path, chunks: Sequence[memoryview]) -> None:
    with path.open("wb", buffering=0) as file:
        for _ in range(_PART_BYTES // _BUFFER_BYTES):
            for chunk in chunks:
                file.write(chunk)


def _map(path: Path) -> None:
    blob = torch.from_file(str(path), shared=False, size=_PART_BYTES, dtype=torch.uint8)
    blob[:: os.sysconf("SC_PAGESIZE")].max()


def disk_read_rate(files: Sequence[Path], readers: int) -> float:
    """Bytes a second of reading files that are not in memory, `readers` at a time, in pieces of 4 MiB."""
    forget_pages(files)

    def read(path: Path) -> int:
        buffer, done = memoryview(bytearray(_READ_BYTES)), 0
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                done += count
        return done

    start = perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        done = sum(pool.map(read, files))
    return done / (perf_counter() - start)


def forget_pages(files: Sequence[Path]) -> None:
    """Has the kernel drop the files' pages, once they are written."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
