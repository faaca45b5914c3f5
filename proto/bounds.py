"""The bounds that cluster.proto states, checked before anything is done with a message; both sides use them."""

import math
import re
from itertools import pairwise

from . import cluster_pb2 as pb

MAX_ADDRESS = 300  # characters of host:port
MAX_SECRET = 128  # characters
MAX_CSR_BYTES = 8 << 10
MAX_CERTIFICATE_BYTES = 32 << 10
MAX_SENTENCE = 1024  # characters
MAX_SOFTWARE = 64  # characters
MAX_THREADS = 4096
MAX_BYTES = 1 << 60  # of memory or of a slice; what is beyond is no real machine
MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 1024
MAX_EXPERTS = 65_536  # of a layer, and of one slice request
MAX_CHUNK_BYTES = 512 << 10
DIGEST_BYTES = 32  # of an expert's hash
MAX_NODES = 1024  # of a cluster, named in one message
MAX_FAULTS = 64  # of sources, named in one message

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class BoundsError(ValueError):
    """A message outside its bounds; its text is one sentence."""


def node_name(name: str) -> str:
    """`name` when it can be a node's. Raises BoundsError."""
    if not _NAME.fullmatch(name):
        raise BoundsError(f"{name[:64]!r} is not a node name: 1 to 63 lower-case letters, digits and inner hyphens.")
    return name


def host_port(address: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of `host:port`. Raises BoundsError."""
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""  # IPv6 needs its brackets
    usable = host and not any(c.isspace() or not c.isprintable() or c in "[]/@" for c in host)
    numeric = port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65_535
    if len(address) > MAX_ADDRESS or not usable or not numeric:
        raise BoundsError(f"{address[:80]!r} is not an address of the form host:port.")
    return host, int(port)


def join_host_port(host: str, port: int) -> str:
    """host:port, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fingerprint(text: str) -> str:
    """`text` when it is 64 hexadecimal digits. Raises BoundsError."""
    if not _FINGERPRINT.fullmatch(text):
        raise BoundsError("A model's fingerprint must be 64 hexadecimal digits.")
    return text


def check_csr(der: bytes) -> None:
    """Raises BoundsError when a certificate request is empty or too large."""
    if not 1 <= len(der) <= MAX_CSR_BYTES:
        raise BoundsError(f"The certificate request has {len(der)} bytes; 1 to {MAX_CSR_BYTES} are allowed.")


def check_join(request: pb.JoinRequest) -> None:
    """Raises BoundsError."""
    if not 1 <= len(request.token_secret) <= MAX_SECRET:
        raise BoundsError(f"A token's secret must have 1 to {MAX_SECRET} characters.")
    node_name(request.node_name)
    check_csr(request.csr_der)


def check_certificate(pem: bytes) -> None:
    """Raises BoundsError when a reply's certificate is empty or too large."""
    if not 1 <= len(pem) <= MAX_CERTIFICATE_BYTES:
        raise BoundsError(f"The certificate has {len(pem)} bytes; 1 to {MAX_CERTIFICATE_BYTES} are allowed.")


def check_join_reply(reply: pb.JoinReply) -> None:
    """Raises BoundsError."""
    check_certificate(reply.certificate_pem)
    host_port(reply.cluster_address)


def check_report(report: pb.NodeReport) -> None:
    """Raises BoundsError, also for a report that says nothing."""
    kind = report.WhichOneof("report")
    if kind is None:
        raise BoundsError("A node's report must say something.")
    if kind == "hello":
        _check_hello(report.hello)
    elif kind == "heartbeat":
        beat = report.heartbeat
        _finite(beat.load, "load")
        _bytes(beat.bytes_held, "bytes_held")
        _bytes(beat.resident_bytes, "resident_bytes")
        for name in ("ram_bytes", "disk_bytes", "vram_bytes"):
            _bytes(getattr(beat.tiers, name), f"{name} of tiers")
        _finite(beat.tiers.disk_bandwidth, "disk_bandwidth")
    elif kind == "progress":
        _bytes(report.progress.bytes_total, "bytes_total")
        if report.progress.bytes_done > report.progress.bytes_total:
            raise BoundsError("bytes_done is more than bytes_total.")
    elif kind == "failed":
        _sentence(report.failed.sentence)


def _check_hello(hello: pb.NodeHello) -> None:
    host_port(hello.address)
    _bytes(hello.ram_bytes, "ram_bytes")
    _bytes(hello.disk_bytes, "disk_bytes")
    _bytes(hello.vram_bytes, "vram_bytes")
    _finite(hello.read_bandwidth, "read_bandwidth")
    _finite(hello.products_per_s, "products_per_s")
    _finite(hello.token_products_per_s, "token_products_per_s")
    if not 1 <= hello.threads <= MAX_THREADS:
        raise BoundsError(f"threads must be 1 to {MAX_THREADS}, not {hello.threads}.")
    if len(hello.software) > MAX_SOFTWARE:
        raise BoundsError(f"software must have at most {MAX_SOFTWARE} characters.")


def check_directive(directive: pb.Directive) -> None:
    """Raises BoundsError, also for a directive that says nothing."""
    kind = directive.WhichOneof("directive")
    if kind is None:
        raise BoundsError("A directive must say something.")
    if kind == "assign":
        assign = directive.assign
        if not 1 <= len(assign.manifest) <= MAX_MANIFEST_BYTES:
            raise BoundsError(f"A manifest must have 1 to {MAX_MANIFEST_BYTES} bytes.")
        if len(assign.layers) > MAX_LAYERS:
            raise BoundsError(f"A slice has at most {MAX_LAYERS} layers.")
        for layer in assign.layers:
            numbers = layer.experts
            if layer.layer >= MAX_LAYERS or len(numbers) > MAX_EXPERTS:
                raise BoundsError(f"A layer's number is under {MAX_LAYERS} and it has at most {MAX_EXPERTS} experts.")
            if any(a >= b for part in (numbers, layer.in_ram, layer.in_vram) for a, b in pairwise(part)):
                raise BoundsError("The experts of a slice's layer must be ascending.")
            if numbers and numbers[-1] >= MAX_EXPERTS:
                raise BoundsError(f"An expert's number must be under {MAX_EXPERTS}.")
            if not {*layer.in_ram, *layer.in_vram}.issubset(numbers):
                raise BoundsError("A slice can keep only its own experts in a tier.")


def check_drain(request: pb.DrainRequest) -> None:
    """Raises BoundsError."""
    node_name(request.node_name)


def check_slice_request(request: pb.SliceRequest) -> None:
    """Raises BoundsError."""
    fingerprint(request.fingerprint)
    _experts(len(request.experts))


def check_chunk(chunk: pb.SliceChunk, nbytes: int) -> None:
    """Checks all but its data, of which it has `nbytes`. Raises BoundsError."""
    if max(nbytes, chunk.zstd_bytes) > MAX_CHUNK_BYTES or chunk.total_bytes > MAX_BYTES:
        raise BoundsError(f"A chunk has at most {MAX_CHUNK_BYTES} bytes.")
    end = chunk.offset + (chunk.zstd_bytes or nbytes)
    if end > chunk.total_bytes:
        raise BoundsError("A chunk reaches beyond its expert's end.")
    if len(chunk.expert_digest) != (DIGEST_BYTES if end == chunk.total_bytes else 0):
        raise BoundsError("The hash of a whole expert belongs on its last chunk, and only there.")


def check_locate(request: pb.LocateRequest) -> None:
    """Raises BoundsError."""
    fingerprint(request.fingerprint)
    _experts(len(request.experts))
    if len(request.avoid) > MAX_NODES or len(request.faults) > MAX_FAULTS:
        raise BoundsError(f"At most {MAX_NODES} nodes to avoid and {MAX_FAULTS} faults can be named at once.")
    for name in (*request.avoid, *(fault.node_name for fault in request.faults)):
        node_name(name)


def check_located(reply: pb.LocateReply, asked: int) -> None:
    """Raises BoundsError when it does not answer for `asked` experts."""
    if len(reply.sources) != asked or len(reply.peers) > MAX_NODES:
        raise BoundsError(f"The coordinator named {len(reply.sources)} sources for {asked} experts.")
    if max(reply.sources, default=0) > len(reply.peers):
        raise BoundsError("The coordinator named a source that it did not describe.")
    for peer in reply.peers:
        node_name(peer.node_name)
        host_port(peer.address)


def check_hash_request(request: pb.HashRequest) -> None:
    """Raises BoundsError."""
    fingerprint(request.fingerprint)
    _experts(len(request.experts))


def check_hashes(reply: pb.HashReply, asked: int) -> None:
    """Raises BoundsError when it does not answer for `asked` experts."""
    if len(reply.digests) != asked or any(len(digest) != DIGEST_BYTES for digest in reply.digests):
        raise BoundsError(f"The coordinator did not give a hash for each of {asked} experts.")


def _experts(count: int) -> None:
    if not 1 <= count <= MAX_EXPERTS:
        raise BoundsError(f"A slice request must name 1 to {MAX_EXPERTS} experts.")


def _finite(value: float, what: str) -> None:
    if not math.isfinite(value) or value < 0:
        raise BoundsError(f"{what} must be a finite number of at least 0.")


def _bytes(value: int, what: str) -> None:
    if value > MAX_BYTES:
        raise BoundsError(f"{what} is over {MAX_BYTES} bytes.")


def _sentence(text: str) -> None:
    if len(text) > MAX_SENTENCE:
        raise BoundsError(f"A sentence has at most {MAX_SENTENCE} characters.")
