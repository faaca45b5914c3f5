"""Requests on their way, on disk: a client that was cut off, or whose coordinator died, gets the rest of the text.

One file a request, named by the hash of its id. Layout, all numbers little-endian:

    4 bytes   length of the header
    header    msgpack: owner (hash of the client's API key), request (the request's own bytes, its seed filled in)
    4 bytes   each token's id, as it is made and before it is sent

Tokens are written, not fsynced: they survive the coordinator's death, and a power cut only as far as the system had
written them by then (then the text goes on from there, or the request is unknown and has to be sent again). Bounded:
MAX_REQUESTS files of MAX_BYTES together, none older than KEEP_SECONDS; the oldest go first.
"""

import contextlib
import hashlib
import logging
import os
import struct
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from time import time

import msgpack

log = logging.getLogger(__name__)

MAX_REQUESTS = 256
MAX_BYTES = 64 << 20
KEEP_SECONDS = 3600.0
MAX_HEADER = 16 << 20
_U32 = struct.Struct("<I")


@dataclass(slots=True)
class Entry:
    """One request: what was asked, and the tokens made so far. `add` is for tokens beyond those."""

    owner: str
    request: bytes
    tokens: list[int]
    file: int = -1  # descriptor that tokens are appended to; -1: the disk failed

    def add(self, token: int) -> None:
        """Writes one more token down; without it the text can't be resumed beyond this place, and goes on."""
        self.tokens.append(token)
        if self.file >= 0:
            try:
                os.write(self.file, _U32.pack(token))
            except OSError as error:
                log.warning("A request can't be journaled any further: %s.", error.strerror)
                self.close()

    def close(self) -> None:
        """No more tokens come for now; the entry stays on disk."""
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


class Journal:
    """Use it on one thread. What the disk refuses is logged and costs the resumption, never the request."""

    def __init__(self, folder: Path) -> None:
        """Takes up what is in `folder`, which is made if need be."""
        self._folder = folder
        self._sizes: OrderedDict[str, tuple[float, int]] = (
            OrderedDict()
        )  # by file name: time, bytes; the oldest first
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [(file.stat().st_mtime, file.stat().st_size, file.name) for file in folder.iterdir()]
        except OSError as error:
            log.warning("Requests can't be journaled in %s: %s.", folder, error.strerror)
            found = []
        for when, size, name in sorted(found):
            self._sizes[name] = when, size
        self._forget()

    def begin(self, request_id: str, owner: str, request: bytes) -> Entry:
        """A new entry; an older one of the same id is replaced."""
        entry = Entry(owner, request, [])
        header = msgpack.packb({"owner": owner, "request": request})
        name = _name(request_id)
        self._sizes.pop(name, None)
        self._sizes[name] = time(), len(header)
        self._forget()
        path = self._folder / name
        try:
            entry.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
            os.write(entry.file, _U32.pack(len(header)) + header)
        except OSError as error:
            log.warning("A request can't be journaled: %s.", error.strerror)
            entry.close()
        return entry

    def find(self, request_id: str, owner: str) -> Entry | None:
        """The entry of `request_id`, to be gone on with; None when there is none of this owner's."""
        path = self._folder / _name(request_id)
        try:
            data = path.read_bytes()
            entry = _parse(data)
            if entry is None or entry.owner != owner:
                return None
            entry.file = os.open(path, os.O_WRONLY | os.O_APPEND)
            whole = len(data) - (len(data) - 4 - _U32.unpack_from(data)[0]) % 4
            os.truncate(entry.file, whole)  # half a token, of a full disk
        except OSError:
            return None
        return entry

    def drop(self, request_id: str) -> None:
        """Forgets an entry: its request was refused."""
        self._remove(_name(request_id))

    def _forget(self) -> None:
        """Removes what is too old or too much."""
        total = sum(size for _, size in self._sizes.values())
        for name, (when, size) in list(self._sizes.items()):
            if len(self._sizes) <= MAX_REQUESTS and total <= MAX_BYTES and time() - when < KEEP_SECONDS:
                break
            total -= size
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._sizes.pop(name, None)
        with contextlib.suppress(OSError):
            (self._folder / name).unlink()


def _name(request_id: str) -> str:
    return hashlib.sha256(request_id.encode()).hexdigest()


def _parse(data: bytes) -> Entry | None:
    """An entry from a file's bytes; None when they are damaged."""
    if len(data) < 4:
        return None
    length = _U32.unpack_from(data)[0]
    if length > min(MAX_HEADER, len(data) - 4):
        return None
    try:
        header = msgpack.unpackb(data[4 : 4 + length])
        owner, request = header["owner"], header["request"]
    except (ValueError, KeyError, TypeError, msgpack.UnpackException):
        return None
    if not isinstance(owner, str) or not isinstance(request, bytes):
        return None
    tokens = data[4 + length :]
    return Entry(owner, request, [_U32.unpack_from(tokens, at)[0] for at in range(0, len(tokens) - 3, 4)])
