"""The reference itself, against transformers' own experts (their eager forward)."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.configuration_muse_spark import MuseSparkTextConfig
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from moehive.kernels.blob import build_blob
from moehive.kernels.geometry import ExpertSpec
from moehive.kernels.ops import load_expert
from moehive.kernels.reference import expert_forward

HIDDEN, MIDDLE, EXPERTS, TOKENS = 48, 24, 4, 6


def fill(module: Any) -> Any:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.eval().float()


Family = tuple[
    Any, ExpertSpec, Callable[[int], dict[str, torch.Tensor]]
]  # module, spec, canonical tensors of an expert


def mixtral() -> Family:
    module = fill(
        MixtralExperts(MixtralConfig(hidden_size=HIDDEN, intermediate_size=MIDDLE, num_local_experts=EXPERTS))
    )
    spec = ExpertSpec(hidden_size=HIDDEN, intermediate_size=MIDDLE, activation="silu", format="f32")
    return module, spec, lambda e: {"up": module.gate_up_proj[e], "down": module.down_proj[e]}


def gpt_oss() -> Family:
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=MIDDLE, num_local_experts=EXPERTS)
    module = fill(GptOssExperts(config))
    module.limit = 1.0  # the real one is 7, which these small numbers would never reach
    spec = ExpertSpec(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        activation="silu",
        alpha=config.swiglu_alpha,
        limit=1.0,
        up_offset=1.0,
        bias=True,
        format="f32",
    )

    def apart(interleaved: torch.Tensor) -> torch.Tensor:
        return torch.cat([interleaved[::2], interleaved[1::2]])

    return (
        module,
        spec,
        lambda e: {
            "up": apart(module.gate_up_proj[e].T),
            "up_bias": apart(module.gate_up_proj_bias[e]),
            "down": module.down_proj[e].T,
            "down_bias": module.down_proj_bias[e],
        },
    )


def muse_spark() -> Family:
    config = MuseSparkTextConfig(moe_hidden_size=HIDDEN, moe_intermediate_size=MIDDLE, num_local_experts=EXPERTS)
    module = fill(MuseSparkExperts(config))
    spec = ExpertSpec(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        activation="silu",
        post_norm_eps=config.post_norm_eps,
        format="f32",
    )
    norm = 1.0 + module.post_expert_norm.weight
    return module, spec, lambda e: {"up": module.gate_up_proj[e], "down": module.down_proj[e], "post_norm": norm}


def step3p7() -> Family:
    config = Step3p7TextConfig(hidden_size=HIDDEN, moe_intermediate_size=MIDDLE, n_routed_experts=EXPERTS)
    module = fill(Step3p7Experts(config, swiglu_limit=1.0))
    spec = ExpertSpec(
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        activation="silu",
        limit=1.0,
        limit_after_activation=True,
        format="f32",
    )
    return module, spec, lambda e: {"up": module.gate_up_proj[e], "down": module.down_proj[e]}


@pytest.mark.parametrize("family", [mixtral, gpt_oss, muse_spark, step3p7])
def test_the_reference_is_what_transformers_computes(family: Callable[[], Family]) -> None:
    module, spec, tensors_of = family()
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2, generator=generator)
    with torch.no_grad():
        expected = inspect.unwrap(type(module).forward)(module, x, ids, weights)
        experts = [load_expert(spec, build_blob(spec, tensors_of(e))) for e in range(EXPERTS)]
        found = torch.zeros_like(x)
        for token in range(TOKENS):
            for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                found[token] += weight * expert_forward(spec, experts[expert].tensors, x[token : token + 1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1
