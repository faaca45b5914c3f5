"""What the client returns: plain data, no gRPC or protobuf types."""

from dataclasses import dataclass, field


class MoehiveError(Exception):
    """A request failed; the text says what is wrong and what to do.

    `code` is gRPC's name of the kind of failure, for example "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED",
    "UNAVAILABLE", "UNAUTHENTICATED" or "DEADLINE_EXCEEDED".
    """

    def __init__(self, sentence: str, code: str) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class TopLogprob:
    """One of the likeliest tokens at a position."""

    token_id: int
    logprob: float
    text: str


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and times of a generation."""

    prompt_tokens: int
    completion_tokens: int
    prompt_seconds: float  # from admission to the first token
    decode_seconds: float  # from the first token to the last


@dataclass(slots=True)
class Piece:
    """New text of a stream and the tokens since the last piece; the last piece has finish_reason and usage."""

    request_id: str
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, when asked for
    top_logprobs: list[list[TopLogprob]] = field(default_factory=list)  # of each token, when asked for
    finish_reason: str | None = None  # "stop", "length" or "cancelled"
    usage: Usage | None = None


@dataclass(slots=True)
class Completion:
    """A whole generation."""

    request_id: str
    text: str
    token_ids: list[int]  # the end-of-text token included, when that ended it
    logprobs: list[float]  # natural logarithm of each token's probability, when asked for; else empty
    top_logprobs: list[list[TopLogprob]]  # the alternatives to each token, when asked for; else empty
    finish_reason: str  # "stop", "length" or "cancelled"
    usage: Usage


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the coordinator serves."""

    id: str
    family: str  # transformers' model_type
    context_length: int  # tokens
    vocabulary: int
    moe_layers: int
    experts_per_layer: int
    expert_bytes: int  # of all experts


@dataclass(frozen=True, slots=True)
class TierStatus:
    """Where the experts of a node lie that has more tiers than RAM; shares are since its start."""

    ram_bytes: int  # of experts in RAM now
    disk_bytes: int
    vram_bytes: int
    hit_rate: float  # share of the experts asked for that did not have to be read from disk
    foreseen_rate: float  # share that was there thanks to a prefetch
    disk_read_bytes: int


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One expert node."""

    name: str
    state: str  # joining, loading, ready, leaving, draining, drained, away, quarantined
    address: str
    experts_held: int
    experts_assigned: int
    bytes_held: int
    ram_bytes: int
    read_bandwidth: float  # bytes a second
    expert_calls: int
    compute_ns: int
    load: float  # one-minute load average
    resident_bytes: int
    load_progress: float  # 0 to 1, of the slice being fetched
    load_bytes: int  # of that slice, that are here
    load_total_bytes: int  # 0: nothing is being loaded
    load_bytes_per_s: float  # of late; 0: not known
    source_fault: str  # the last wrong bytes that it gave to another node, in words
    problem: str  # why it could not load its slice, or is quarantined, in one sentence
    tiers: TierStatus | None  # None: all of its experts are in RAM
    round_trip_s: float  # of the link to it, measured; 0: not yet
    link_bandwidth: float  # bytes a second, measured; 0: not yet
    disk_bytes: int  # of disk that it gives to experts beyond ram_bytes
    vram_bytes: int  # of a GPU's memory that it gives to experts
    disk_bandwidth: float  # bytes a second, measured by the node; 0: not yet
    products_per_s: float  # of a number and a weight in q8_0, measured by the node; 0: not measured
    token_products_per_s: float  # the same of one token with weights in q4_k that lie in caches


@dataclass(frozen=True, slots=True)
class Status:
    """The cluster and what it does now."""

    version: str
    model: str
    ready: bool  # every expert has a node that is there
    reason: str  # one sentence when not ready
    epoch: int
    nodes: list[NodeStatus]
    running: int  # generations
    waiting: int
    kv_bytes_used: int
    kv_bytes_limit: int
    resident_bytes: int  # of the coordinator's process
    uptime_seconds: float
    cache_margin: float  # of cache-aware routing; 0: off
