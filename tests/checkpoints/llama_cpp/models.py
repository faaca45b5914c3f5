"""Small random checkpoints as transformers writes them, for llama.cpp's converter. Plain module, importable by path.

    save("deepseek_v3", template, folder)    # weights, config, tokenizer and chat template; always the same

Each is made as the published ones are in what a converter treats in a way of its own: scaled rope (DeepSeek-V3,
gpt-oss), partial rope, biases and correction of the router, groups of experts, a first dense layer, more value heads
than key heads, a layer that predicts a further token (Qwen, GLM-4.5), a sliding window shorter than the texts.

Rows of all matrices are runs of one pool's: each row is quantized by itself, so the archives, which find what
repeats, are a small part of the files. The router reads columns that no layer writes to, so that rounding never moves
a token to another expert.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

COLUMNS = 256  # of a row in the pool: a block of the K-quants
POOL, RUN = 128, 16  # rows: in all, and beside each other in each matrix
ROUTED = 8  # columns that the router reads
BYTES = 256
COMMON: dict[str, Any] = {
    "hidden_size": COLUMNS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "intermediate_size": 256, "moe_intermediate_size": 256,
}  # fmt: skip
_YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 512, "num_experts": 4, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},  # of which llama-quantize has rules of its own
    "qwen3_5_moe_text": {
        "num_experts": 4, "shared_expert_intermediate_size": 256, "head_dim": 128, "num_attention_heads": 2,
        "num_key_value_heads": 1, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "mtp_num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                            "mrope_interleaved": True, "mrope_section": [6, 5, 5]},
    },
    "qwen3_next": {
        "num_experts": 4, "shared_expert_intermediate_size": 256, "head_dim": 128, "num_attention_heads": 2,
        "num_key_value_heads": 1, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6, "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
    "deepseek_v3": {
        "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
        "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32, "v_head_dim": 64, "max_position_embeddings": 163840, "scoring_func": "sigmoid",
        "rope_parameters": _YARN | {"rope_theta": 1e4, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "gpt_oss": {
        "num_local_experts": 4, "sliding_window": 8, "max_position_embeddings": 131072,
        "rope_parameters": _YARN | {"rope_theta": 15e4, "factor": 32.0, "truncate": False},
    },
    "glm4_moe": {
        "n_routed_experts": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "attention_bias": True,
        "use_qk_norm": True, "routed_scaling_factor": 2.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    },
}  # fmt: skip
# How llama.cpp names the way that a family's published tokenizer splits a text.
SPLIT = {
    "qwen3_moe": "qwen2", "qwen3_next": "qwen2", "qwen3_5_moe_text": "qwen35", "deepseek_v3": "deepseek-v3",
    "gpt_oss": "gpt-4o", "glm4_moe": "glm4", "mixtral": "default",
}  # fmt: skip
_HYBRID = ("qwen3_next", "qwen3_5_moe_text")  # some layers have a linear attention
# Ends of the names of what adds to the hidden states.
_WRITERS = ("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight", "o_proj.bias", "down_proj_bias")
# Their published chat templates, as llama.cpp's source keeps them (models/templates).
TEMPLATE = {
    "qwen3_moe": "Qwen-Qwen3-0.6B", "qwen3_next": "Qwen-Qwen3-0.6B", "qwen3_5_moe_text": "Qwen3.5-4B",
    "deepseek_v3": "deepseek-ai-DeepSeek-V3.1", "gpt_oss": "openai-gpt-oss-120b", "glm4_moe": "GLM-4.6",
    "mixtral": "mistralai-Mistral-Nemo-Instruct-2407",
}  # fmt: skip
# Control tokens: what begins a text (None: nothing does), what ends it, and others that templates write.
_CONTROL: dict[str, tuple[str | None, str, tuple[str, ...]]] = {
    "qwen3_moe": (None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "qwen3_next": (None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "qwen3_5_moe_text": (None, "<|im_end|>", ("<|endoftext|>", "<|im_start|>")),
    "deepseek_v3": (
        "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        ("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
    ),
    "gpt_oss": (
        "<|startoftext|>",
        "<|return|>",
        ("<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>"),
    ),
    "mixtral": ("<s>", "</s>", ()),
    "glm4_moe": (
        None,
        "<|endoftext|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ),
}


def save(family: str, template: str, folder: Path) -> None:
    """Writes model, tokenizer and chat template to `folder`, f32 numbers that bf16 holds exactly."""
    folder.mkdir(exist_ok=True)
    tokens = _sentencepiece(folder) if family == "mixtral" else _byte_level(family, folder)
    beginning, ending = specials(family)
    values = COMMON | FAMILIES[family] | {"vocab_size": len(tokens), "eos_token_id": tokens.index(ending)}
    values["bos_token_id"] = tokens.index(beginning) if beginning else None
    torch.manual_seed(1)
    config = CONFIG_MAPPING[family](**values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    pool = torch.randn(POOL, COLUMNS) / COLUMNS**0.5
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *_correction(model)]:
            turned = family == "gpt_oss" and tensor.dim() == 3  # [experts, in, out], of others [experts, out, in]
            shape = tuple(tensor.transpose(1, 2).shape if turned else tensor.shape)
            numbers = _random(name, shape, pool)
            if name.endswith(_WRITERS):
                (numbers if name.endswith("bias") else numbers.transpose(-1, -2))[..., :ROUTED] = 0
            if family in _HYBRID and name.endswith("norm.weight") and "linear_attn" not in name:
                numbers -= 1  # these are added to one
            tensor.copy_((numbers.transpose(1, 2) if turned else numbers).bfloat16())
    model.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if further := _further(family, values, pool):
        file = folder / "model.safetensors"
        save_file(load_file(file) | further, file, {"format": "pt"})


def specials(family: str) -> tuple[str | None, str]:
    """The tokens that begin (None: none does) and end a text."""
    beginning, ending, _ = _CONTROL[family]
    return beginning, ending


def _byte_level(family: str, folder: Path) -> list[str]:
    """A tokenizer of the printable characters and a few merges, with the family's own control tokens."""
    beginning, ending, others = _CONTROL[family]
    letters = [*(chr(n) for n in range(33, 127)), "\u0120", "\u010a"]  # what stands for a space and a new line
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("1", "9")]
    tokens = [*letters, *("".join(merge) for merge in merges)]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token in (beginning, ending, *others) if token]
    tokenizer.add_special_tokens(control)
    names = {"bos_token": beginning, "eos_token": ending, "add_bos_token": family == "deepseek_v3"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return [*tokens, *control]


def _sentencepiece(folder: Path) -> list[str]:
    """As `_byte_level`, in the form that Mixtral was published in: pieces with scores, and one for each byte."""
    from sentencepiece import sentencepiece_model_pb2 as pb2  # type: ignore[import-not-found]

    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]  # a piece, its score, its type
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(BYTES)]
    pieces += [(letter, -100.0, 1) for letter in ["\u2581", *(chr(n) for n in range(33, 127))]]
    pieces += [(piece, -1.0 - n, 1) for n, piece in enumerate(["\u2581t", "he", "\u2581the"])]
    model = pb2.ModelProto()
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True}))
    return [piece for piece, _, _ in pieces]


def _correction(model: Any) -> list[tuple[str, torch.Tensor]]:
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]


def _random(name: str, shape: tuple[int, ...], pool: torch.Tensor) -> torch.Tensor:
    """Numbers of the size that a trained model has, for the parameter of this name."""
    if name.endswith("A_log"):  # a state that is forgotten over some five to fifty tokens
        return torch.empty(shape).uniform_(0.02, 0.2).log()
    if name.endswith(("bias", "sinks")):
        return 0.2 * torch.randn(shape)
    if len(shape) == 1:
        return 1 + 0.2 * torch.randn(shape)
    if name.endswith((".gate.weight", ".router.weight")):
        return torch.cat([torch.randn(shape[0], ROUTED), torch.zeros(shape[0], shape[1] - ROUTED)], 1)
    if "embed_tokens" in name or "lm_head" in name:  # every token its own row
        numbers = torch.zeros(shape)
        # Of Mixtral's tokens for bytes only the new line's is used.
        used = [n for n in range(shape[0]) if shape[0] <= POOL or not 3 <= n < 3 + BYTES or n == 3 + 10]
        numbers[used] = (8 if "embed" in name else 2) * pool[torch.randperm(POOL)[: len(used)]]
        return numbers
    numbers = _runs(torch.Size(shape).numel() // COLUMNS, pool).view(shape) * (8 if "conv1d" in name else 1)
    if name.endswith("kv_b_proj.weight"):  # of whose keys the converter makes rows of the columns
        keys, heads = FAMILIES["deepseek_v3"]["qk_nope_head_dim"], COMMON["num_attention_heads"]
        turned = _runs(heads * COLUMNS, pool)[:, :keys].reshape(heads, COLUMNS, keys)
        numbers.view(heads, -1, COLUMNS)[:, :keys] = turned.transpose(1, 2)
    return numbers


def _runs(rows: int, pool: torch.Tensor) -> torch.Tensor:
    """So many rows of the pool, [rows, COLUMNS]."""
    picks = (torch.randint(POOL, (-(-rows // RUN), 1)) + torch.arange(RUN)) % POOL
    return pool[picks.view(-1)[:rows]]


def _further(family: str, values: dict[str, Any], pool: torch.Tensor) -> dict[str, torch.Tensor]:
    """The layer that predicts a further token, which transformers leaves out, by the published names."""
    hidden, heads, head = COLUMNS, values["num_attention_heads"], values["head_dim"]
    inner, kv = values["moe_intermediate_size"], values["num_key_value_heads"] * head
    if family == "glm4_moe":
        layer, joined, norms = "model.layers.2.", "eh_proj", ("enorm", "hnorm", "shared_head.norm")
        prefix, experts, query, shared = layer, values["n_routed_experts"], heads * head, "shared_experts"
    elif family in _HYBRID:
        layer, joined, norms = "mtp.layers.0.", "fc", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        prefix, experts, query, shared = "mtp.", values["num_experts"], 2 * heads * head, "shared_expert"
    else:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}self_attn.q_proj.weight": (query, hidden),
        f"{layer}self_attn.k_proj.weight": (kv, hidden),
        f"{layer}self_attn.v_proj.weight": (kv, hidden),
        f"{layer}self_attn.o_proj.weight": (hidden, heads * head),
        f"{layer}mlp.gate.weight": (experts, hidden),
        f"{prefix}{joined}.weight": (hidden, 2 * hidden),
        **{f"{prefix}{norm}.weight": (hidden,) for norm in norms},
        **{f"{layer}self_attn.{part}_norm.weight": (head,) for part in "qk"},
        **{f"{layer}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")},
    }
    for mlp in (f"{shared}.", *(f"experts.{n}." for n in range(experts))):
        shapes |= {f"{layer}mlp.{mlp}{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        shapes[f"{layer}mlp.{mlp}down_proj.weight"] = (hidden, inner)
    if family == "glm4_moe":
        shapes |= {
            f"{layer}self_attn.{part}_proj.bias": (size,) for part, size in (("q", query), ("k", kv), ("v", kv))
        }
        shapes[f"{layer}mlp.gate.e_score_correction_bias"] = (experts,)
    else:
        shapes[f"{layer}mlp.shared_expert_gate.weight"] = (1, hidden)
    return {name: _random(name, shape, pool).bfloat16().float().contiguous() for name, shape in shapes.items()}
