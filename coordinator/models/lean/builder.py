"""What the families' builders share: layers made of a source's tensors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from moehive.kernels.geometry import Activation
from moehive.kernels.layer import GatedMlp, Router
from moehive.kernels.linear import LinearWeights
from moehive.kernels.trunk_ops import AttentionLayer, RouterLayer

from ..tensors import Embedding, TensorSource, embedding_of
from .attention import Attention, SoftmaxAttention
from .batch import Ops
from .cache import CacheLayout
from .mlp import DenseMlp, Mlp, MoeMlp
from .parts import Layer
from .rope import Rope, rope_of

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}  # a config's hidden_act → ours


def head_dim_of(config: Any) -> int:
    """Numbers of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(slots=True)
class Builder:
    """Makes one model's layers, in their order. `prefix`: of the decoder's tensors, with the dot at its end."""

    config: Any  # transformers' text config
    tensors: TensorSource
    ops: Ops
    prefix: str = "model."
    cache: CacheLayout = field(default_factory=CacheLayout)
    moe_layers: int = 0  # so far
    norm_offset: float = 0.0  # 1 for a family that stores its norms' weights as the difference from 1
    rope: Rope = field(init=False)

    def __post_init__(self) -> None:
        self.rope = rope_of(self.config, head_dim_of(self.config))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` as f32."""
        return self.tensors.tensor(f"{self.prefix}{name}")

    def norm(self, name: str) -> torch.Tensor:
        """The weight of the norm `name`, f32."""
        return self.tensor(f"{name}.weight") + self.norm_offset

    def linear(self, name: str) -> LinearWeights:
        """The linear layer `name` with its bias."""
        return self.tensors.linear(f"{self.prefix}{name}.weight")

    def layers(self, attention: Callable[[int], Attention], mlp: Callable[[int], Mlp]) -> list[Layer]:
        """All layers, in the usual order of norm, attention, norm, MLP; both are asked for those of each number."""
        return [
            Layer(
                self.norm(f"layers.{n}.input_layernorm"),
                attention(n),
                self.norm(f"layers.{n}.post_attention_layernorm"),
                mlp(n),
            )
            for n in range(self.config.num_hidden_layers)
        ]

    def attention(
        self,
        name: str,
        window: int | None = None,
        gated: bool = False,
        norms: bool = False,
        sinks: bool = False,
    ) -> SoftmaxAttention:
        """Softmax attention with the usual names q_proj, k_proj, v_proj, o_proj, q_norm, k_norm, sinks."""
        config, head_dim = self.config, head_dim_of(self.config)
        group = self.cache.group(window)
        layer = AttentionLayer(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary=self.rope.rotary,
            scale=head_dim**-0.5,
            page_at=self.cache.page_end(group),
            dtype=self.tensors.dtype,
            window=window,
            gated=gated,
            query_norm=self.norm(f"{name}.q_norm") if norms else None,
            key_norm=self.norm(f"{name}.k_norm") if norms else None,
            eps=config.rms_norm_eps,
            sinks=self.tensor(f"{name}.sinks") if sinks else None,
        )
        self.cache.add_to_page(group, layer.page_bytes)
        projections = [self.linear(f"{name}.{part}_proj") for part in "qkv"]
        return SoftmaxAttention(self.ops, layer, group, projections, self.linear(f"{name}.o_proj"))

    def dense(self, name: str, share: str | None = None) -> DenseMlp:
        """A gated MLP with the usual names gate_proj, up_proj, down_proj; `share` names what weights a shared one."""
        gate, up, down = (self.linear(f"{name}.{part}_proj") for part in ("gate", "up", "down"))
        weigher = None if share is None else self.linear(share)
        activation = ACTIVATIONS[self.config.hidden_act]
        return DenseMlp(self.ops, GatedMlp(gate=gate, up=up, down=down, activation=activation, share=weigher))

    def sigmoid_router(self, name: str) -> RouterLayer:
        """A router with sigmoid scores, a bias for the choice and groups, as DeepSeek-V3 has it."""
        config = self.config
        return RouterLayer(
            experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            scores="sigmoid",
            renormalize=config.norm_topk_prob,
            bias=self.tensor(f"{name}.e_score_correction_bias"),
            groups=config.n_group,
            top_groups=config.topk_group,
            scaling=config.routed_scaling_factor,
        )

    def moe_after_dense(self, n: int) -> Mlp:
        """Layer `n`'s MLP, dense in the first layers, as DeepSeek-V3 and GLM-4.5 have it."""
        name = f"layers.{n}.mlp"
        if n < self.config.first_k_dense_replace:
            return self.dense(name)
        return self.moe(self.sigmoid_router(f"{name}.gate"), f"{name}.gate", f"{name}.shared_experts")

    def moe(
        self,
        router: RouterLayer,
        router_name: str,
        shared: str | None = None,
        shared_gate: str | None = None,
    ) -> Mlp:
        """The next MoE layer; `shared` names its shared expert, `shared_gate` the layer that weights it."""
        ordinal = self.moe_layers
        self.moe_layers += 1
        return MoeMlp(
            self.ops,
            ordinal,
            Router(self.linear(router_name), router),
            None if shared is None else self.dense(shared, shared_gate),
        )

    def embedding_and_head(self) -> tuple[Embedding, LinearWeights]:
        """The first and the last matrix, one in memory where they are tied and plain."""
        name = f"{self.prefix}embed_tokens.weight"
        if "lm_head.weight" in self.tensors and not self.config.tie_word_embeddings:
            return self.tensors.embedding(name), self.tensors.linear("lm_head.weight")
        head = self.tensors.linear(name)
        return embedding_of(head) if head.is_plain else self.tensors.embedding(name), head
