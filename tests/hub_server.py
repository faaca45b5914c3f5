"""A small HTTP server that speaks as much of the hub's API as huggingface_hub asks. Plain module.

    with HubServer({"org/name": {"config.json": b"…"}}) as hub:
        …                       # HF_ENDPOINT=hub.url
        hub.sent["model.safetensors"]    # bytes of its contents that were sent

Files named *.safetensors and *.gguf are large ones, with a SHA-256. `cut_after` ends each reply for such a file after
so many bytes; `damage` changes a byte in files of that name on the way; `before` is called with a file's name before
its contents are sent. `asked` has the first byte and the end of all ranges that were asked for; without `ranges` they
are not known here, and whole files are sent. `sizes` and `hashes` say others of files than they have. `refused` has
the status and the error code that the hub answers with when a file of that repository is asked for.
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves repositories: name → path → contents."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.sent: Counter[str] = Counter()
        self.asked: dict[str, list[tuple[int, int]]] = {}
        self.ranges = True
        self.sizes: dict[str, int] = {}
        self.hashes: dict[str, str] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.cut_after: int | None = None
        self.damage: str | None = None
        self.before: Callable[[str], object] = lambda name: None
        self.replies_until_cut: int | None = None  # then every reply for a large file is empty
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.partition("?")[0]
        for name, files in self.repositories.items():
            if path.startswith(f"/api/models/{name}"):
                return self._json(request, self._info(name, files, path))
            if path.startswith(f"/{name}/resolve/"):
                if name in self.refused:
                    status, code = self.refused[name]
                    return self._json(request, {"error": code}, status, {"X-Error-Code": code})
                file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
                if file in files:
                    return self._file(request, file, files[file], body)
        self._json(request, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _info(self, name: str, files: dict[str, bytes], path: str) -> Any:
        siblings = [
            {
                "rfilename": file,
                "size": self.sizes.get(file, len(data)),
                "blobId": hashlib.sha1(data).hexdigest(),
                **(
                    {"lfs": {"size": len(data), "sha256": self._hash(file, data), "pointerSize": 1}}
                    if _large(file)
                    else {}
                ),
            }
            for file, data in files.items()
        ]
        if "/tree/" in path:
            return [{"type": "file", "oid": s["blobId"], "size": s["size"], "path": s["rfilename"]} for s in siblings]
        return {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}

    def _hash(self, file: str, data: bytes) -> str:
        return self.hashes.get(file, _sha256(data))

    def _json(
        self, request: BaseHTTPRequestHandler, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        request.send_response(status)
        for key, text in (headers or {}).items():
            request.send_header(key, text)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data)

    def _file(self, request: BaseHTTPRequestHandler, name: str, data: bytes, body: bool) -> None:
        start, stop = 0, len(data)
        if "Range" in request.headers and body and self.ranges:
            first, _, last = request.headers["Range"].removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, stop) if last else stop
            self.asked.setdefault(name, []).append((start, stop))
        etag = _sha256(data) if _large(name) else hashlib.sha1(data).hexdigest()
        request.send_response(206 if start or stop < len(data) else 200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("ETag", f'"{etag}"')
        request.send_header("X-Linked-Etag", f'"{etag}"')
        request.send_header("X-Linked-Size", str(len(data)))
        request.send_header("Content-Length", str(stop - start))
        request.end_headers()
        if not body:
            return
        self.before(name)
        if name == self.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        piece = data[start:stop]
        if _large(name) and self.cut_after is not None and len(piece) > self.cut_after:
            piece = piece[: self.cut_after]
            request.close_connection = True
            if self.replies_until_cut is not None:
                if self.replies_until_cut == 0:
                    piece = b""
                else:
                    self.replies_until_cut -= 1
        self.sent[name] += len(piece)
        request.wfile.write(piece)


def _large(name: str) -> bool:
    return name.endswith((".safetensors", ".gguf"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
