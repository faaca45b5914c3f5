"""Of a hub's model, the headers alone: files of its own names and sizes, whose weights are holes that take no disk.

Whatever opens a model reads headers and no weights, so it opens these files as it would the download, and no format
is known twice. huggingface_hub reads the headers of safetensors, too, but takes what a server sends for one into
memory whole, which is the file where a server knows no ranges; here every reply is bounded.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from ..types import CoordinatorError
from .blob_download import Unreachable
from .gguf.file import MAX_PARTS, header_size
from .hub import HubId, Listing, in_words
from .hub_files import HubFile, chosen_path, needed_files
from .json_files import MAX_JSON
from .quantized.unread_shapes import fill_shapes

MAX_HEADER = 64 << 20  # bytes of one; huggingface_hub takes 25 MB of safetensors, a GGUF has the tokenizer in it
MAX_HEADERS = 256 << 20  # bytes of all
MAX_FILE = 1 << 43  # bytes that a file may claim
_STREAMS = 8
_FIRST = 64 << 10  # bytes of a GGUF that are fetched at once; then as many again as there are already
_PARTIAL = 206


def fetch_headers(wanted: HubId, listing: Listing, folder: Path) -> Path:
    """Makes the files in `folder`, which is empty; the model's directory, or its GGUF file.

    What is fetched: config.json, the index of the shards, and each file's header. Raises CoordinatorError, one
    sentence.
    """
    hub = _Hub(wanted.repository, listing.revision, folder)
    with in_words(wanted.repository):
        chosen = needed_files(wanted.repository, listing.files, wanted.choice, lambda name: hub.small(listing, name))
        weights = [file for file in chosen if file.name.endswith((".safetensors", ".gguf"))]
        if len(weights) > MAX_PARTS:
            raise CoordinatorError(f"{wanted.repository} has {len(weights)} files of weights, far too many.")
        if any(file.name == "config.json" for file in chosen):
            hub.small(listing, "config.json")
        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(hub.header, weights))
        fill_shapes(folder, sorted(folder.glob("*.safetensors")))
    return chosen_path(folder, wanted.repository, wanted.choice)


class _Hub:
    """One repository, and how much of it was fetched."""

    def __init__(self, repository: str, revision: str, folder: Path) -> None:
        self._repository = repository
        self._revision = revision
        self._folder = folder
        self._left = MAX_HEADERS
        self._lock = threading.Lock()

    def small(self, listing: Listing, name: str) -> Path:
        """A small file, whole."""
        file = next(file for file in listing.files if file.name == name)
        if file.size > MAX_JSON:
            raise CoordinatorError(f"{self._repository} has a {name} of {file.size} bytes, far too many.")
        path = self._path(file)
        if not path.exists():
            path.write_bytes(self.get(name, 0, file.size))
        return path

    def header(self, file: HubFile) -> None:
        """The header of a file of weights, and a hole behind it."""
        path = self._path(file)
        remote = _Remote(self, file)
        if file.name.endswith(".gguf"):
            header_size(Path(file.name), remote, file.size)
        else:
            length = int.from_bytes(remote.read(8), "little")
            remote.read(min(length, file.size - 8))  # a header that claims more is refused by whoever opens it
        with path.open("xb") as out:
            out.write(remote.data)
            out.truncate(file.size)

    def get(self, name: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop` of a file, and not one more, whatever is sent."""
        with self._lock:
            self._left -= stop - start
            if self._left < 0:
                raise CoordinatorError(f"{self._repository} claims headers of more than {MAX_HEADERS >> 20} MiB.")
        if start == stop:
            return b""
        url = hf_hub_url(self._repository, name, revision=self._revision)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        data = bytearray()
        try:
            with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as reply:
                hf_raise_for_status(reply)
                if reply.status_code != _PARTIAL and start > 0:
                    raise CoordinatorError(f"The hub sends no parts of {name}, so its header can't be had alone.")
                for piece in reply.iter_raw():
                    data += piece[: stop - start - len(data)]
                    if len(data) == stop - start:  # a server without ranges is not listened to any longer
                        return bytes(data)
        except (CoordinatorError, HfHubHTTPError):
            raise
        except Exception as error:  # httpx's many ways of a broken connection
            if not type(error).__module__.startswith(("httpx", "httpcore")):
                raise
            raise Unreachable(str(error) or type(error).__name__) from error
        raise Unreachable(f"{len(data)} of {stop - start} bytes of {name} came")

    def _path(self, file: HubFile) -> Path:
        parts = Path(file.name).parts
        if not parts or Path(file.name).is_absolute() or ".." in parts or "\0" in file.name:
            raise CoordinatorError(f"{self._repository} names a file {file.name[:80]!r}, which lies outside of it.")
        if not 0 <= file.size <= MAX_FILE:
            raise CoordinatorError(f"{self._repository} names {file.name[:80]} with {file.size} bytes.")
        path = self._folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


class _Remote:
    """A file's beginning, fetched as far as it is read: of safetensors to the byte, of a GGUF some way ahead."""

    def __init__(self, hub: _Hub, file: HubFile) -> None:
        self.data = bytearray()
        self._hub = hub
        self._file = file
        self._position = 0

    def read(self, count: int) -> bytes:
        """The next `count` bytes, fewer at the file's end."""
        stop = min(self._position + count, self._file.size)
        have = len(self.data)
        if stop > have:
            if stop > MAX_HEADER:
                raise CoordinatorError(f"{self._file.name} claims a header of more than {MAX_HEADER >> 20} MiB.")
            ahead = stop
            if self._file.name.endswith(".gguf"):  # which does not say how long its header is
                ahead = min(max(stop, 2 * have, _FIRST), MAX_HEADER, self._file.size)
            self.data += self._hub.get(self._file.name, have, ahead)
        found = bytes(self.data[self._position : stop])
        self._position = stop
        return found
