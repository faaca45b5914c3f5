"""`moehive bench trunk`: what one layer of a trunk costs for one token, its experts answering at once.

Two questions. Layers 64 wide read nothing worth mentioning: what is left is overhead. Layers of real sizes should
take as long as memory takes to give their weights. The lean trunk and transformers' eager layer (the generic trunk)
have the same random weights and take turns, and between them the same threads read plain memory. Only the first rows
of a large quantized matrix are really quantized, and stand for the others too: times do not depend on the numbers.
One case has many tokens in the cache, where attention reads as much as the weights are.
"""

import statistics
from collections.abc import Awaitable, Generator, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moehive.kernels.blob import empty_blob
from moehive.kernels.formats.plain import PLAIN_TYPES
from moehive.kernels.formats.registry import FORMATS
from moehive.kernels.geometry import tensor_bytes
from moehive.kernels.linear import LinearOps, LinearWeights
from moehive.kernels.trunk_ops import TrunkOps

from ..models.base import SequenceInput, Trunk, without_waiting
from ..models.generic import GenericTrunk
from ..models.lean import families
from ..models.lean.batch import Ops
from ..models.tensors import Embedding, PlainEmbedding
from .timing import read_seconds, seconds_of, torch_threads
from .trunk_bytes import cache_bytes_of

PROMPT = 128  # tokens in the cache before the first that is timed
_LONG_PROMPT, _LONG_LAYERS = 4096, 8
_READ_BYTES = 256 << 20
_QUANTIZED_ROWS = 128  # whole blocks of every format
_SMALL: dict[str, Any] = {  # what the layers are asked for is their width; the rest as little as goes
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 8,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
}  # fmt: skip
# The routed experts are computed elsewhere: they are one wide here, so that they take no memory. All layers together
# are far larger than caches.
_REAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5-35b": ("qwen3_5_moe_text", {
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "num_hidden_layers": 4, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1,
        "shared_expert_intermediate_size": 512, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    }),
    "qwen3-30b": ("qwen3_moe", {
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_hidden_layers": 16, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1,
    }),
}  # fmt: skip
_SMALL_FAMILIES = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "deepseek_v3", "gpt_oss", "glm4_moe")
_REAL_FORMATS = ("bf16", "q8_0", "q4_0", "q4_k", "q6_k", "fp8_block")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrunkRow:
    """One layer, the mean over a trunk's layers, with `context` tokens in the cache. Times in microseconds, bytes of
    weights, recurrent state and cache that a layer reads for a token.

    `bandwidth` and `read_bandwidth` are bytes a second, of the layer and of a plain read in the same run; `ratio` is
    the first by the second, and means something where the layer does not fit into caches. `eager_us` is of the same
    weights in bf16, or f32 where `format` is f32. `threads` of the CPU, or 0: a GPU (trunk_gpu.py).
    """

    family: str
    shape: str
    format: str
    context: int
    threads: int
    layer_us: float
    eager_us: float
    bytes: int
    bandwidth: float
    read_bandwidth: float
    ratio: float


class Case(NamedTuple):
    """One trunk to be measured with `prompt` tokens in the cache; tokens in a repetition, of transformers' layers
    `eager_tokens`."""

    shape: str
    family: str
    config: dict[str, Any]
    formats: tuple[str, ...]
    tokens: int
    eager_tokens: int
    prompt: int = PROMPT


def measure_trunk(quick: bool, threads: int) -> list[dict[str, Any]]:
    """All shapes, real sizes with `threads`, small ones with one; `quick`: fewer families, formats, repetitions.

    Raises NativeLibraryError without the native library.
    """
    rows: list[TrunkRow] = []
    with torch.no_grad():
        for case in cases(quick):
            count = 1 if case.config is _SMALL else threads
            with torch_threads(count):
                rows += _measure(case, count, repeats=3 if quick else 9)
    return [asdict(row) for row in rows]


def cases(quick: bool) -> list[Case]:
    """The trunks that are measured."""
    small = _SMALL_FAMILIES[:1] if quick else _SMALL_FAMILIES
    real = list(_REAL)[:1] if quick else list(_REAL)
    formats = tuple(fmt for fmt in (_REAL_FORMATS[:3] if quick else _REAL_FORMATS) if fmt in FORMATS)
    found = [Case("64 wide", family, _SMALL, ("f32",), 40, 10) for family in small]
    for name in real:
        family, config = _REAL[name]
        found.append(Case(name, family, config, formats, 96 // config["num_hidden_layers"], 1))
    if not quick:
        family, config = _REAL["qwen3-30b"]
        long = config | {"num_hidden_layers": _LONG_LAYERS}
        found.append(Case("qwen3-30b", family, long, ("q4_0",), 12, 1, _LONG_PROMPT))
    return found


def _measure(case: Case, threads: int, repeats: int) -> Iterator[TrunkRow]:
    ops = Ops(LinearOps(threads), TrunkOps(threads))
    model = random_model(case)
    layers = model.config.num_hidden_layers
    eager = GenericTrunk(model, experts_of(model), case.family, 4096)
    eager_step = Decode(eager, case.prompt)
    memory = torch.ones(_READ_BYTES, dtype=torch.uint8)
    for fmt in case.formats:
        tensors = ModelTensors(model, fmt)
        lean = families.build(model.config, tensors, ops)
        lean_step = Decode(lean, case.prompt)
        times: list[list[float]] = [[], [], []]
        for _ in range(repeats):
            for series, step, tokens in (
                (times[0], lean_step, case.tokens),
                (times[1], eager_step, case.eager_tokens),
            ):
                step.token()  # wakes the threads: a decode's tokens come one after the other
                series.append(seconds_of(step.token, tokens))
            times[2].append(read_seconds(memory, threads))
        lean_s, eager_s, read_s = (statistics.median(series) for series in times)
        layer_s = lean_s / case.tokens / layers
        nbytes = (tensors.layer_bytes + lean_step.cache_bytes) // layers
        read_bandwidth = _READ_BYTES / read_s
        yield TrunkRow(
            family=case.family,
            shape=case.shape,
            format=fmt,
            context=case.prompt,
            threads=threads,
            layer_us=layer_s * 1e6,
            eager_us=eager_s / case.eager_tokens / layers * 1e6,
            bytes=nbytes,
            bandwidth=nbytes / layer_s,
            read_bandwidth=read_bandwidth,
            ratio=nbytes / layer_s / read_bandwidth,
        )


def random_model(case: Case) -> Any:
    """transformers' model with random weights, f32 or bf16; its vocabulary is small, for its layers are measured."""
    configs: Any = CONFIG_MAPPING
    config = configs[case.family](vocab_size=256, max_position_embeddings=4096, pad_token_id=0)
    known = config.to_dict()
    for name, value in case.config.items():
        if name in known or name == "head_dim":  # which some families' configs have only if they are told
            setattr(config, name, value)
    if "kv_lora_rank" in known:  # each head has keys of its own, made of the latent
        config.num_key_value_heads = config.num_attention_heads
    if "layer_types" in known:  # the config's own pattern, as long as there are layers
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    dtype = torch.float32 if case.formats == ("f32",) else torch.bfloat16
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def experts_of(model: Any) -> tuple[Any, ...]:
    """The modules of its routed experts, in the layers' order."""
    return tuple(m for m in model.modules() if hasattr(m, "num_experts") and hasattr(m, "is_concatenated"))


class ModelTensors:
    """`models.tensors.TensorSource` of a model's own tensors, its layers' matrices in `format`."""

    def __init__(self, model: Any, format: str) -> None:
        self.dtype: torch.dtype = model.dtype
        self.layer_bytes = 0  # of all layers' matrices
        self._format: Any = format
        self._tensors: dict[str, torch.Tensor] = model.state_dict()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def linear(self, name: str) -> LinearWeights:
        """See TensorSource."""
        numbers = self._tensors[name]
        rows, columns = numbers.shape
        blob = empty_blob(tensor_bytes(self._format, rows, columns))
        some = numbers if self._format in PLAIN_TYPES else numbers[:_QUANTIZED_ROWS]
        first = blob[: tensor_bytes(self._format, len(some), columns)]
        FORMATS[self._format].encode(some.float(), first)
        for start in range(len(first), len(blob), len(first)):
            blob[start : start + len(first)] = first[: len(blob) - start]
        if ".layers." in name:
            self.layer_bytes += len(blob)
        bias = self._tensors.get(f"{name.removesuffix('weight')}bias")
        return LinearWeights(self._format, rows, columns, blob, None if bias is None else bias.float())

    def column_order(self, name: str) -> torch.Tensor | None:
        """See TensorSource."""
        return None

    def tensor(self, name: str) -> torch.Tensor:
        """See TensorSource."""
        return self._tensors[name].float().contiguous()

    def embedding(self, name: str) -> Embedding:
        """See TensorSource."""
        return PlainEmbedding(self._tensors[name])


class _Ready:
    """An answer that is there when it is awaited."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value = value

    def __await__(self) -> Generator[None, None, torch.Tensor]:
        yield from ()  # never waits
        return self._value


class _InstantExperts:
    """An ExpertBackend that adds nothing, at once."""

    def __init__(self) -> None:
        self._zeros: dict[tuple[torch.Size, torch.dtype], _Ready] = {}

    def submit(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> Awaitable[torch.Tensor]:
        key = hidden.shape, hidden.dtype
        if key not in self._zeros:
            self._zeros[key] = _Ready(torch.zeros_like(hidden))
        return self._zeros[key]


class Decode:
    """One sequence that grows by a token with each call."""

    def __init__(self, trunk: Trunk, prompt: int = PROMPT) -> None:
        self._trunk = trunk
        self._experts = _InstantExperts()
        self._cache = trunk.new_cache()
        self._run(torch.arange(prompt) % trunk.vocab_size)
        self.token()

    def token(self) -> torch.Tensor:
        """The next token's logits, f32 [vocab]."""
        return self._run(torch.tensor([3]))

    @property
    def cache_bytes(self) -> int:
        """Of the sequence, which a token reads; of a lean trunk's."""
        return cache_bytes_of(self._cache)

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        return without_waiting(self._trunk.forward([SequenceInput(tokens, self._cache)], self._experts))[0]
