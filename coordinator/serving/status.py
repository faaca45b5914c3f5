"""What a coordinator says of itself and of its model; plain data that both APIs translate."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The model that is served."""

    id: str
    family: str  # transformers' model_type
    context_length: int  # tokens
    vocabulary: int
    moe_layers: int
    experts_per_layer: int
    expert_bytes: int  # of all experts


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStatus:
    """Where the experts of a node lie that has more tiers than RAM; shares are since its start."""

    ram_bytes: int  # of experts in RAM now
    disk_bytes: int
    vram_bytes: int
    hit_rate: float  # share of the experts asked for that did not have to be read from disk
    foreseen_rate: float  # share that was there thanks to a prefetch
    disk_read_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """One expert node."""

    name: str
    state: str  # the value of cluster/state.py's Phase
    address: str = ""
    experts_held: int = 0
    experts_assigned: int = 0
    bytes_held: int = 0
    ram_bytes: int = 0
    read_bandwidth: float = 0.0  # bytes a second, measured by the node
    expert_calls: int = 0
    compute_ns: int = 0
    load: float = 0.0
    resident_bytes: int = 0
    load_progress: float = 0.0  # 0 to 1
    load_bytes: int = 0  # of the slice being loaded, that are here
    load_total_bytes: int = 0  # 0: nothing is being loaded
    load_bytes_per_s: float = 0.0  # of late; 0: not known
    source_fault: str = ""  # the last wrong bytes that it gave to another node, in words
    problem: str = ""  # why it could not load its slice, or is quarantined, in one sentence
    round_trip_s: float = 0.0  # of the link, measured; 0: not yet
    link_bandwidth: float = 0.0  # bytes a second, measured; 0: not yet
    disk_bytes: int = 0  # of disk that it gives to experts beyond ram_bytes
    vram_bytes: int = 0  # of a GPU's memory that it gives to experts
    disk_bandwidth: float = 0.0  # bytes a second, measured by the node; 0: not yet
    # Of a number and a weight, measured by the node; 0: not measured. In q8_0 with many tokens, in q4_k with one.
    products_per_s: float = 0.0
    token_products_per_s: float = 0.0
    tiers: TierStatus | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What the cluster part knows; the engine's load is added at the door."""

    ready: bool  # every expert has a node that is there
    has_plan: bool = False  # the experts are placed: while some have no node, requests are slow or wait
    reason: str = ""  # one sentence when not ready
    epoch: int = 0
    nodes: tuple[NodeStatus, ...] = field(default=())
    resident_bytes: int = 0  # of the coordinator's process
    uptime_seconds: float = 0.0
    cache_margin: float = 0.0  # of cache-aware routing; 0: off
