#!/usr/bin/env python3
"""Makes the archives beside it: small models converted, quantized, split and run by llama.cpp's own programs.

    python tests/checkpoints/llama_cpp/make.py [FAMILY | text]...

One archive a family, FAMILY.tar.xz: `F32.gguf` of `convert_hf_to_gguf.py`, `KIND.gguf` of each kind of
`llama-quantize`, parts that `llama-gguf-split` made, and `logits.npz` with what `llama-results` says to each of
`TEXTS`. text.tar.xz is text.py's. llama.cpp is built first where it is not (tests/bench/build_llama_cpp.py). The
weights are random but always the same (models.py); llama.cpp's logits depend a little on the processor. The converter
reads Mixtral's tokenizer with the package sentencepiece; text.py asks tiktoken. Nothing else here needs the two.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import gguf
import numpy as np
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
sys.path.append(str(TESTS))  # as pytest does

from by_path import load  # noqa: E402

models = load(HERE / "models.py")
TEXTS = ("the cat sat on the mat,\nthen left", "In 1969 the eagle (Apollo 11) landed!")
# File → the arguments of llama-quantize; all are made of F32.
KINDS: dict[str, tuple[str, ...]] = {
    **{kind: (kind,) for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4_MOE")},
    **{kind: (kind,) for kind in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "F16", "BF16")},
    **{kind: ("--imatrix", "IMATRIX", kind) for kind in ("Q2_K_S", "IQ3_XXS")},
    "dynamic": (
        *("--tensor-type", r"blk\.1\.ffn_(gate|up)_exps=iq4_xs", "--tensor-type", r"blk\.0\.ffn_gate_exps=q5_k"),
        *("--tensor-type", "ffn_down_exps=q6_k", "--tensor-type", "attn_v=q8_0", "Q4_K_M"),
    ),
    "mixed": (
        *("--tensor-type", "ffn_(gate|up)_exps=iq4_xs", "--tensor-type", "ffn_down_exps=q5_k"),
        *("--tensor-type", "ssm_out=q6_k", "--tensor-type", "shexp=q8_0", "Q3_K_M"),
    ),
}
OF_FAMILY: dict[str, tuple[str, ...]] = {
    "qwen3_moe": tuple(kind for kind in KINDS if kind != "mixed"),
    "mixtral": ("Q2_K", "Q3_K_M", "Q4_K_M", "Q8_0", "IQ4_XS"),
    "qwen3_5_moe_text": ("Q8_0", "Q4_K_M", "mixed"),
    "qwen3_next": ("Q8_0", "Q4_K_M"),
    "deepseek_v3": ("Q8_0", "Q4_K_M", "Q2_K", "mixed"),
    "gpt_oss": ("Q8_0", "Q4_K_M", "MXFP4_MOE", "published"),
    "glm4_moe": ("Q8_0", "Q4_K_M", "mixed"),
}
# Kinds that the converter writes of a checkpoint whose experts are MXFP4 already, as gpt-oss is published.
PUBLISHED = "published"
# Of Mixtral's kind → the arguments of llama-gguf-split.
SPLITS = {"Q4_K_M": ("--split-max-tensors", "9"), "Q3_K_M": ("--split-max-tensors", "12", "--no-tensor-first-split")}


def convert(source: Path, split: str, folder: Path, path: Path, *options: str) -> None:
    """Has llama.cpp's converter write `path` of the checkpoint in `folder`, whose texts are split as `split` says."""
    run(Path(sys.executable), HERE / "convert.py", source, split, folder, "--outfile", path, *options)


def published(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with its experts in MXFP4, as gpt-oss was published, in one file, in whose order all is read."""
    load(HERE.parent / "gpt_oss.py").publish(checkpoint, folder)
    parts = sorted(folder.glob("model-*.safetensors"))
    whole = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    for file in (*parts, folder / "model.safetensors.index.json"):
        file.unlink()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    for file in (*checkpoint.glob("*token*"), checkpoint / "chat_template.jinja"):
        shutil.copy(file, folder)
    return folder


def importance(source: Path, path: Path) -> None:
    """An importance matrix as llama-imatrix writes it, alike for every matrix, so that equal rows stay equal."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    squares = np.random.default_rng(2).lognormal(0, 1, models.COLUMNS).astype(np.float32)
    for tensor in gguf.GGUFReader(source).tensors:
        if len(tensor.shape) > 1 and tensor.shape[0] % models.COLUMNS == 0:
            columns, matrices = int(tensor.shape[0]), int(tensor.shape[2]) if len(tensor.shape) > 2 else 1
            sums = np.tile(squares, (matrices, columns // models.COLUMNS))
            writer.add_tensor(f"{tensor.name}.in_sum2", sums)
            writer.add_tensor(f"{tensor.name}.counts", np.ones((matrices, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(program: Path, *arguments: str | Path) -> str:
    """Runs one of llama.cpp's programs and returns what it printed; says what it said when it fails."""
    command = ["nice", "-n", "10", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{program.name} {' '.join(map(str, arguments))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def logits(program: Path, path: Path, text: str) -> tuple[np.ndarray, np.ndarray]:
    """llama.cpp's token ids, int32 [T], and what it says after each of them, f32 [T, vocabulary]."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.gguf"
        exact = ("-c", "256", "-ctk", "f32", "-ctv", "f32", "-fa", "off")  # rounded only as the file's types ask for
        run(program, "-m", path, "-p", text, "-o", out, "-t", "1", *exact)
        found = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(out).tensors}
    return found["tokens"].reshape(-1), found["logits"].reshape(len(found["tokens"].reshape(-1)), -1)


def make(family: str, source: Path, programs: dict[str, Path], folder: Path) -> None:
    """The archive of one family."""
    checkpoint, template = folder / "checkpoint", source / "models" / "templates" / f"{models.TEMPLATE[family]}.jinja"
    models.save(family, template.read_text(), checkpoint)
    out, split = folder / "out", models.SPLIT[family]
    out.mkdir()
    exact = out / "F32.gguf"
    convert(source, split, checkpoint, exact, "--outtype", "f32")
    importance(exact, folder / "importance")
    for kind in OF_FAMILY[family]:
        path = out / f"{kind}.gguf"
        if kind == PUBLISHED:
            convert(source, split, published(checkpoint, folder / PUBLISHED), path, "--outtype", "q8_0")
            continue
        *options, last = (str(folder / "importance") if a == "IMATRIX" else a for a in KINDS[kind])
        run(programs["llama-quantize"], *options, exact, path, last, "1")
    texts = [padded(programs["llama-tokenize"], exact, text) for text in TEXTS]
    said: dict[str, np.ndarray] = {"texts": np.array(texts)}
    for path in sorted(out.glob("*.gguf")):
        for number, text in enumerate(texts):
            said[f"tokens {number}"], found = logits(programs["llama-results"], path, text)
            said[f"{path.stem} {number}"] = found if path == exact else found.astype(np.float16)
    np.savez(out / "logits.npz", **said)  # type: ignore[arg-type]
    for kind, options in SPLITS.items() if family == "mixtral" else ():
        run(programs["llama-gguf-split"], "--split", *options, out / f"{kind}.gguf", out / f"split-{kind}")
    write_archive(out, family)


def padded(program: Path, path: Path, text: str) -> str:
    """`text` with points at its end that make its tokens a multiple of four: llama-results fails at other lengths."""
    while len(tokens(program, path, "-p", text)) % 4:
        text += "."
    return text


def tokens(program: Path, path: Path, *text: str | Path) -> list[int]:
    """What llama-tokenize makes of a text."""
    found: list[int] = json.loads(run(program, "-m", path, "--ids", "--no-escape", "--log-disable", *text))
    return found


def write_archive(folder: Path, name: str) -> None:
    """All files in `folder` as NAME.tar.xz beside this script."""
    path = HERE / f"{name}.tar.xz"
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name, filter=_plain)
    print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time, so that the same files make the same archive."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    """Of the families named, or all, and of text."""
    builder = load(TESTS / "bench" / "build_llama_cpp.py")
    home = builder.default_folder()
    programs, source = builder.build(home), builder.source(home)
    for name in sys.argv[1:] or [*OF_FAMILY, "text"]:
        with tempfile.TemporaryDirectory() as folder:
            if name == "text":
                load(HERE / "text.py").make(source, programs, Path(folder), sys.modules[__name__])
            else:
                make(name, source, programs, Path(folder))


if __name__ == "__main__":
    main()
