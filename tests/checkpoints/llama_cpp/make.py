#!/usr/bin/env python3
"""Makes the archives beside it: small models quantized, split and run by llama.cpp's own programs.

    python tests/checkpoints/llama_cpp/make.py [FAMILY]...

One archive a family, FAMILY.tar.xz: `KIND.gguf` of each kind of `llama-quantize`, parts that `llama-gguf-split` made,
and `logits.npz` with what `llama-results` says to each text of `TEXTS`. llama.cpp is built first where it is not
(tests/bench/build_llama_cpp.py). The weights are random but always the same; llama.cpp's logits depend a little on
the processor.

Rows of all matrices are taken from one pool: each row is quantized by itself, so the archives, which find what
repeats, are a twentieth of the files. The router reads columns that no layer writes to, so that rounding never moves
a token to another expert.
"""

import importlib.util
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
COLUMNS = 256  # of a row in the pool: a block of the K-quants
POOL = 128  # rows
ROUTED = 8  # columns that the router reads
TEXTS = ("the cat sat on the mat,\nthen left", "In 1969 the eagle (Apollo 11) landed!")
COMMON: dict[str, Any] = {
    "hidden_size": COLUMNS, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts_per_tok": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False, "intermediate_size": 256,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 512, "num_experts": 4, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8},  # of which llama-quantize has rules of its own
}
# File → the arguments of llama-quantize; all but F32 are made of that one.
KINDS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4_MOE")},
    **{kind: (kind,) for kind in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "F16", "BF16")},
    **{kind: ("--imatrix", "IMATRIX", kind) for kind in ("Q2_K_S", "IQ3_XXS")},
    "dynamic": (
        *("--tensor-type", r"blk\.1\.ffn_(gate|up)_exps=iq4_xs", "--tensor-type", r"blk\.0\.ffn_gate_exps=q5_k"),
        *("--tensor-type", "ffn_down_exps=q6_k", "--tensor-type", "attn_v=q8_0", "Q4_K_M"),
    ),
}
OF_FAMILY = {"qwen3_moe": tuple(KINDS), "mixtral": ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0", "IQ4_XS")}
# Of the kind → the arguments of llama-gguf-split.
SPLITS = {"Q4_K_M": ("--split-max-tensors", "9"), "Q3_K_M": ("--split-max-tensors", "12", "--no-tensor-first-split")}


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moehive_llama_cpp_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(family: str) -> Any:
    """transformers' model, f32, of numbers that bf16 holds exactly."""
    values = COMMON | FAMILIES[family] | {"vocab_size": len(_tokens(family)[0])}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32).eval()
    pool = torch.randn(POOL, COLUMNS) / COLUMNS**0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape))
            elif ".gate.weight" in name:
                parameter.zero_()[:, :ROUTED] = torch.randn(len(parameter), ROUTED)
            elif "embed" in name or "lm_head" in name:  # every token its own row
                parameter.copy_((8 if "embed" in name else 2) * pool[torch.randperm(POOL)[: len(parameter)]])
            else:
                picks = torch.randint(POOL, (parameter.numel() // COLUMNS,))
                parameter.copy_(pool[picks].view(parameter.shape))
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter[..., :ROUTED, :] = 0
            parameter.copy_(parameter.bfloat16())
    return model


def _tokens(family: str) -> tuple[list[str], list[int]]:
    """Tokens and their types: control 3, bytes 6, unknown 2, others 1."""
    printable = [chr(n) for n in range(33, 127)]
    if family == "mixtral":  # sentencepiece
        tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", *printable, "\u2581t", "he", "\u2581the"]
        return tokens, [2, 3, 3, 6, *[1] * (len(tokens) - 4)]
    tokens = [*printable, "Ġ", "Ċ", "Ġt", "he", "Ġthe", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokens, [*[1] * (len(tokens) - 3), 3, 3, 3]


def describe(family: str, writer: gguf.GGUFWriter) -> None:
    """Adds the tokenizer, as the converter writes it."""
    tokens, types = _tokens(family)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if family == "mixtral":
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([0.0] * 4 + [-100.0] * (len(tokens) - 7) + [-1.0, -2.0, -3.0])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
        writer.add_eos_token_id(len(tokens) - 1)


def importance(source: Path, path: Path) -> None:
    """An importance matrix as llama-imatrix writes it, alike for every matrix, so that equal rows stay equal."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    squares = np.random.default_rng(2).lognormal(0, 1, COLUMNS).astype(np.float32)
    for tensor in gguf.GGUFReader(source).tensors:
        if len(tensor.shape) > 1:
            columns, matrices = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            sums = np.tile(squares, (matrices, columns // COLUMNS))
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.ones((matrices, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(program: Path, *arguments: str | Path) -> None:
    """Runs one of llama.cpp's programs; says what it said when it fails."""
    done = subprocess.run(["nice", "-n", "10", program, *arguments], capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise SystemExit(f"{program.name} {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")


def logits(program: Path, path: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """llama.cpp's token ids, int32 [T], and what it says after each of them, f32 [T, vocabulary]."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.gguf"
        exact = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")  # nothing is rounded but what the file's types ask for
        run(program, "-m", path, "-p", text, "-o", out, "-t", "1", *exact)
        found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
    return found["tokens"].reshape(-1), found["logits"].reshape(len(found["tokens"].reshape(-1)), -1)


def make(family: str, programs: dict[str, Path], folder: Path) -> None:
    """The archive of one family."""
    model = model_of(family)
    writer = _module(TESTS / "coordinator" / "gguf_writer.py")
    exact = folder / "F32.gguf"
    writer.write(model, model.config, exact, describe=lambda target: describe(family, target))
    importance(exact, folder / "importance")
    for kind in OF_FAMILY[family]:
        *options, last = (str(folder / "importance") if a == "IMATRIX" else a for a in KINDS[kind])
        run(programs["llama-quantize"], *options, exact, folder / f"{kind}.gguf", last, "1")
    (folder / "importance").unlink()
    said: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.gguf")):
        for number, text in enumerate(TEXTS):
            said[f"tokens {number}"], said[f"{path.stem} {number}"] = logits(programs["llama-results"], path, text)
    np.savez(folder / "logits.npz", **said)  # type: ignore[arg-type]
    for kind, options in SPLITS.items():
        run(programs["llama-gguf-split"], "--split", *options, folder / f"{kind}.gguf", folder / f"split-{kind}")
    with tarfile.open(HERE / f"{family}.tar.xz", "w:xz", preset=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=_plain)
    print(f"{family}.tar.xz: {(HERE / f'{family}.tar.xz').stat().st_size:,} bytes")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files make the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    """Of the families named, or all."""
    builder = _module(TESTS / "bench" / "build_llama_cpp.py")
    programs = builder.build(builder.default_folder())
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            make(family, programs, Path(folder))


if __name__ == "__main__":
    main()
