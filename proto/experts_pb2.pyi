from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_F32: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]

class Reduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REDUCTION_UNSPECIFIED: _ClassVar[Reduction]
    REDUCTION_PARTIAL_SUM: _ClassVar[Reduction]
    REDUCTION_PER_EXPERT: _ClassVar[Reduction]
DTYPE_UNSPECIFIED: Dtype
DTYPE_F32: Dtype
DTYPE_BF16: Dtype
DTYPE_INT8: Dtype
REDUCTION_UNSPECIFIED: Reduction
REDUCTION_PARTIAL_SUM: Reduction
REDUCTION_PER_EXPERT: Reduction

class ComputeRequest(_message.Message):
    __slots__ = ("id", "epoch", "step", "layer", "tokens", "hidden_size", "dtype", "reduction", "hidden_states", "offsets", "experts", "weights", "scales", "likely", "chain")
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    REDUCTION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_STATES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    LIKELY_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    id: int
    epoch: int
    step: int
    layer: int
    tokens: int
    hidden_size: int
    dtype: Dtype
    reduction: Reduction
    hidden_states: bytes
    offsets: bytes
    experts: bytes
    weights: bytes
    scales: bytes
    likely: _containers.RepeatedScalarFieldContainer[bytes]
    chain: _containers.RepeatedCompositeFieldContainer[ChainNode]
    def __init__(self, id: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., layer: _Optional[int] = ..., tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., reduction: _Optional[_Union[Reduction, str]] = ..., hidden_states: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., experts: _Optional[bytes] = ..., weights: _Optional[bytes] = ..., scales: _Optional[bytes] = ..., likely: _Optional[_Iterable[bytes]] = ..., chain: _Optional[_Iterable[_Union[ChainNode, _Mapping]]] = ...) -> None: ...

class ChainNode(_message.Message):
    __slots__ = ("node_name", "address", "offsets", "experts", "weights")
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    node_name: str
    address: str
    offsets: bytes
    experts: bytes
    weights: bytes
    def __init__(self, node_name: _Optional[str] = ..., address: _Optional[str] = ..., offsets: _Optional[bytes] = ..., experts: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class ComputeReply(_message.Message):
    __slots__ = ("id", "compute_ns", "rows", "values", "refusal", "scales", "on_disk", "chain_ns", "began_ns", "reading_ns", "waited_ns", "wrote_ns")
    ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    CHAIN_NS_FIELD_NUMBER: _ClassVar[int]
    BEGAN_NS_FIELD_NUMBER: _ClassVar[int]
    READING_NS_FIELD_NUMBER: _ClassVar[int]
    WAITED_NS_FIELD_NUMBER: _ClassVar[int]
    WROTE_NS_FIELD_NUMBER: _ClassVar[int]
    id: int
    compute_ns: int
    rows: int
    values: bytes
    refusal: Refusal
    scales: bytes
    on_disk: bytes
    chain_ns: _containers.RepeatedScalarFieldContainer[int]
    began_ns: int
    reading_ns: int
    waited_ns: int
    wrote_ns: int
    def __init__(self, id: _Optional[int] = ..., compute_ns: _Optional[int] = ..., rows: _Optional[int] = ..., values: _Optional[bytes] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., scales: _Optional[bytes] = ..., on_disk: _Optional[bytes] = ..., chain_ns: _Optional[_Iterable[int]] = ..., began_ns: _Optional[int] = ..., reading_ns: _Optional[int] = ..., waited_ns: _Optional[int] = ..., wrote_ns: _Optional[int] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("reason", "sentence", "node_name")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        REASON_UNSPECIFIED: _ClassVar[Refusal.Reason]
        REASON_EXPERT_MISSING: _ClassVar[Refusal.Reason]
        REASON_STALE_EPOCH: _ClassVar[Refusal.Reason]
        REASON_DRAINING: _ClassVar[Refusal.Reason]
        REASON_FAILED: _ClassVar[Refusal.Reason]
    REASON_UNSPECIFIED: Refusal.Reason
    REASON_EXPERT_MISSING: Refusal.Reason
    REASON_STALE_EPOCH: Refusal.Reason
    REASON_DRAINING: Refusal.Reason
    REASON_FAILED: Refusal.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    NODE_NAME_FIELD_NUMBER: _ClassVar[int]
    reason: Refusal.Reason
    sentence: str
    node_name: str
    def __init__(self, reason: _Optional[_Union[Refusal.Reason, str]] = ..., sentence: _Optional[str] = ..., node_name: _Optional[str] = ...) -> None: ...
