from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class JoinRequest(_message.Message):
    __slots__ = ("token_secret", "node_name", "csr_der")
    TOKEN_SECRET_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    token_secret: str
    node_name: str
    csr_der: bytes
    def __init__(self, token_secret: _Optional[str] = ..., node_name: _Optional[str] = ..., csr_der: _Optional[bytes] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("certificate_pem", "cluster_address")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    cluster_address: str
    def __init__(self, certificate_pem: _Optional[bytes] = ..., cluster_address: _Optional[str] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("csr_der",)
    CSR_DER_FIELD_NUMBER: _ClassVar[int]
    csr_der: bytes
    def __init__(self, csr_der: _Optional[bytes] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate_pem",)
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: bytes
    def __init__(self, certificate_pem: _Optional[bytes] = ...) -> None: ...

class NodeReport(_message.Message):
    __slots__ = ("hello", "heartbeat", "progress", "ready", "failed", "leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    heartbeat: Heartbeat
    progress: SliceProgress
    ready: SliceReady
    failed: SliceFailed
    leaving: Leaving
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., progress: _Optional[_Union[SliceProgress, _Mapping]] = ..., ready: _Optional[_Union[SliceReady, _Mapping]] = ..., failed: _Optional[_Union[SliceFailed, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("address", "ram_bytes", "read_bandwidth", "threads", "software", "disk_bytes", "vram_bytes", "products_per_s", "token_products_per_s")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    VRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRODUCTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOKEN_PRODUCTS_PER_S_FIELD_NUMBER: _ClassVar[int]
    address: str
    ram_bytes: int
    read_bandwidth: float
    threads: int
    software: str
    disk_bytes: int
    vram_bytes: int
    products_per_s: float
    token_products_per_s: float
    def __init__(self, address: _Optional[str] = ..., ram_bytes: _Optional[int] = ..., read_bandwidth: _Optional[float] = ..., threads: _Optional[int] = ..., software: _Optional[str] = ..., disk_bytes: _Optional[int] = ..., vram_bytes: _Optional[int] = ..., products_per_s: _Optional[float] = ..., token_products_per_s: _Optional[float] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("experts_held", "bytes_held", "calls", "expert_calls", "compute_ns", "resident_bytes", "load", "tiers")
    EXPERTS_HELD_FIELD_NUMBER: _ClassVar[int]
    BYTES_HELD_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_CALLS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    experts_held: int
    bytes_held: int
    calls: int
    expert_calls: int
    compute_ns: int
    resident_bytes: int
    load: float
    tiers: Tiers
    def __init__(self, experts_held: _Optional[int] = ..., bytes_held: _Optional[int] = ..., calls: _Optional[int] = ..., expert_calls: _Optional[int] = ..., compute_ns: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., load: _Optional[float] = ..., tiers: _Optional[_Union[Tiers, _Mapping]] = ...) -> None: ...

class Tiers(_message.Message):
    __slots__ = ("ram_bytes", "disk_bytes", "lookups", "in_ram", "foreseen", "prefetches", "disk_read_bytes", "vram_bytes", "disk_bandwidth")
    RAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOOKUPS_FIELD_NUMBER: _ClassVar[int]
    IN_RAM_FIELD_NUMBER: _ClassVar[int]
    FORESEEN_FIELD_NUMBER: _ClassVar[int]
    PREFETCHES_FIELD_NUMBER: _ClassVar[int]
    DISK_READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    VRAM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
    ram_bytes: int
    disk_bytes: int
    lookups: int
    in_ram: int
    foreseen: int
    prefetches: int
    disk_read_bytes: int
    vram_bytes: int
    disk_bandwidth: float
    def __init__(self, ram_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., lookups: _Optional[int] = ..., in_ram: _Optional[int] = ..., foreseen: _Optional[int] = ..., prefetches: _Optional[int] = ..., disk_read_bytes: _Optional[int] = ..., vram_bytes: _Optional[int] = ..., disk_bandwidth: _Optional[float] = ...) -> None: ...

class SliceProgress(_message.Message):
    __slots__ = ("epoch", "bytes_done", "bytes_total")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BYTES_DONE_FIELD_NUMBER: _ClassVar[int]
    BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    bytes_done: int
    bytes_total: int
    def __init__(self, epoch: _Optional[int] = ..., bytes_done: _Optional[int] = ..., bytes_total: _Optional[int] = ...) -> None: ...

class SliceReady(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class SliceFailed(_message.Message):
    __slots__ = ("epoch", "sentence")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    sentence: str
    def __init__(self, epoch: _Optional[int] = ..., sentence: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Directive(_message.Message):
    __slots__ = ("assign", "commit", "release")
    ASSIGN_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    assign: AssignSlice
    commit: CommitEpoch
    release: Release
    def __init__(self, assign: _Optional[_Union[AssignSlice, _Mapping]] = ..., commit: _Optional[_Union[CommitEpoch, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class AssignSlice(_message.Message):
    __slots__ = ("epoch", "manifest", "layers")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    manifest: bytes
    layers: _containers.RepeatedCompositeFieldContainer[LayerSlice]
    def __init__(self, epoch: _Optional[int] = ..., manifest: _Optional[bytes] = ..., layers: _Optional[_Iterable[_Union[LayerSlice, _Mapping]]] = ...) -> None: ...

class LayerSlice(_message.Message):
    __slots__ = ("layer", "experts", "in_ram", "in_vram")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    IN_RAM_FIELD_NUMBER: _ClassVar[int]
    IN_VRAM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedScalarFieldContainer[int]
    in_ram: _containers.RepeatedScalarFieldContainer[int]
    in_vram: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[int]] = ..., in_ram: _Optional[_Iterable[int]] = ..., in_vram: _Optional[_Iterable[int]] = ...) -> None: ...

class CommitEpoch(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("node_name",)
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    node_name: str
    def __init__(self, node_name: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("released", "sentence")
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    released: bool
    sentence: str
    def __init__(self, released: _Optional[bool] = ..., sentence: _Optional[str] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("fingerprint", "experts", "avoid", "faults")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    AVOID_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    experts: _containers.RepeatedCompositeFieldContainer[ExpertWanted]
    avoid: _containers.RepeatedScalarFieldContainer[str]
    faults: _containers.RepeatedCompositeFieldContainer[SourceFault]
    def __init__(self, fingerprint: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[ExpertWanted, _Mapping]]] = ..., avoid: _Optional[_Iterable[str]] = ..., faults: _Optional[_Iterable[_Union[SourceFault, _Mapping]]] = ...) -> None: ...

class SourceFault(_message.Message):
    __slots__ = ("node_name", "layer", "expert")
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    node_name: str
    layer: int
    expert: int
    def __init__(self, node_name: _Optional[str] = ..., layer: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class LocateReply(_message.Message):
    __slots__ = ("peers", "sources")
    PEERS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    sources: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., sources: _Optional[_Iterable[int]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("node_name", "address")
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    node_name: str
    address: str
    def __init__(self, node_name: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class HashRequest(_message.Message):
    __slots__ = ("fingerprint", "experts")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    experts: _containers.RepeatedCompositeFieldContainer[ExpertWanted]
    def __init__(self, fingerprint: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[ExpertWanted, _Mapping]]] = ...) -> None: ...

class HashReply(_message.Message):
    __slots__ = ("digests",)
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    digests: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, digests: _Optional[_Iterable[bytes]] = ...) -> None: ...

class SliceRequest(_message.Message):
    __slots__ = ("fingerprint", "experts", "zstd")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ZSTD_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    experts: _containers.RepeatedCompositeFieldContainer[ExpertWanted]
    zstd: bool
    def __init__(self, fingerprint: _Optional[str] = ..., experts: _Optional[_Iterable[_Union[ExpertWanted, _Mapping]]] = ..., zstd: _Optional[bool] = ...) -> None: ...

class ExpertWanted(_message.Message):
    __slots__ = ("layer", "expert", "offset")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    offset: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class SliceChunk(_message.Message):
    __slots__ = ("layer", "expert", "offset", "total_bytes", "data", "expert_digest", "zstd_bytes")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    EXPERT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ZSTD_BYTES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    offset: int
    total_bytes: int
    data: bytes
    expert_digest: bytes
    zstd_bytes: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ..., offset: _Optional[int] = ..., total_bytes: _Optional[int] = ..., data: _Optional[bytes] = ..., expert_digest: _Optional[bytes] = ..., zstd_bytes: _Optional[int] = ...) -> None: ...
