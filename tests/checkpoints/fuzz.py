"""Hostile input for every reader of files: valid ones, damaged in many ways. Run it for many inputs:

    python tests/checkpoints/fuzz.py [--inputs 20000] [--json]

Each input must be read, or refused with an error of ours in one sentence; memory must not follow what a file claims.
"""

import argparse
import functools
import hashlib
import json
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import msgpack
import numpy as np
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from moehive.coordinator.checkpoints.directory import open_directory
from moehive.coordinator.checkpoints.gguf.config import read_config
from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.checkpoints.json_files import INDEX
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.outline import Outlines
from moehive.coordinator.checkpoints.pack.convert import convert
from moehive.coordinator.checkpoints.pack.manifest import NAME as PACK
from moehive.coordinator.checkpoints.pack.manifest import content_fingerprint, file_name, offsets, read_manifest
from moehive.coordinator.checkpoints.quantized.find import ordinary_tensors
from moehive.coordinator.checkpoints.quantized.method import method_of
from moehive.coordinator.checkpoints.safetensors_file import read_header
from moehive.coordinator.types import CoordinatorError
from moehive.kernels import manifest as manifests
from moehive.kernels.geometry import ExpertSpec, GeometryError, LayerGeometry, Manifest

MEMORY_GROWTH = 256 << 20  # bytes that thousands of inputs may add to what the process held before
LARGEST_FILE = 1 << 40  # bytes of a file without contents
EDGES = (0, 1, 2, 7, 8, 9, 31, 32, 127, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """`whole` with up to four changes, or none.

    Numbers are set to edges, bytes changed, pieces cut out, doubled or inserted.
    """
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["byte", "u32", "u64", "cut", "drop", "double", "insert"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "u32":
                data[at : at + 4] = struct.pack("<I", draw(st.sampled_from(EDGES)) & 0xFFFFFFFF)
            case "u64":
                data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(EDGES)))
            case "cut":
                del data[at:]
            case "drop":
                del data[at : at + draw(st.integers(1, 64))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case _:
                data[at:at] = draw(st.binary(max_size=16))
    return bytes(data)


VALUES: Any = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.sampled_from([*EDGES, -1, -(2**63), 10**30]), st.floats(), st.text(max_size=8),
        st.sampled_from(["../x.safetensors", "/etc/passwd", "F32", "I4", "x.bin", "\0.safetensors", ""]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A JSON value with up to three places replaced by something else."""
    value = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        place = value
        while isinstance(place, dict | list) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            deeper = isinstance(place[key], dict | list) and place[key] and draw(st.booleans())
            if not deeper:
                place[key] = draw(VALUES)
                break
            place = place[key]
    return value


@st.composite
def like(draw: Any, whole: Manifest) -> Manifest:
    """A description of experts that differs from `whole` in some numbers, or in none."""

    def or_other(truth: Any, *others: Any) -> Any:
        return draw(st.sampled_from((truth,) * 8 + others))

    first = whole.layers[0]
    spec = replace(
        first.spec,
        hidden_size=or_other(first.spec.hidden_size, 1, 2**16),
        intermediate_size=or_other(first.spec.intermediate_size, 1, 2**16),
        activation=or_other(first.spec.activation, "gelu", "relu2"),
        gated=or_other(first.spec.gated, False),
        limit=or_other(first.spec.limit, 7.0),
        format=or_other(first.spec.format, "q4_k", "f32"),
    )
    experts = or_other(first.experts, 1, 1000)
    layer = LayerGeometry(experts, min(experts, or_other(first.top_k, 1)), spec)
    name = draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
    return replace(whole, name=name, layers=(layer,) * or_other(len(whole.layers), 1, 7))


def signed_pack(said: Manifest) -> bytes:
    """The manifest of a small model's pack, but for the experts, of which it says `said`; it is true to itself."""
    hashes = tuple(bytes(32 * layer.experts) for layer in said.layers)
    said = replace(said, fingerprint=content_fingerprint(said, hashes))
    packed = msgpack.unpackb(_pack_body())
    return _signed(msgpack.packb(packed | {"manifest": manifests.to_bytes(said), "hashes": list(hashes)}))


@st.composite
def edited(draw: Any) -> bytes:
    """The manifest of a small model's pack with one field replaced by something else."""
    packed = msgpack.unpackb(_pack_body())
    field = draw(st.sampled_from(sorted(packed)))
    text = st.text() | st.sampled_from(["x" * 300, "/" + "x" * 5000, "\0", "/proc/self/mem"])
    packed[field] = draw(st.one_of(VALUES, text, st.lists(st.tuples(text, st.integers(0, 1000), st.binary()))))
    return _signed(_packed(packed))


class Readers:
    """Each reader with valid files to damage, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.inputs: dict[str, Any] = {
            "gguf": st.one_of(st.binary(max_size=200), damaged(_gguf_file())),
            "safetensors": st.one_of(*(self._shards(method) for method in _STORED)),
            "index": st.tuples(changed(_INDEX), changed(_CONFIG), st.integers(0, 3)),
            "manifest": st.one_of(
                st.binary(max_size=200),
                damaged(manifests.to_bytes(_described())),
                VALUES.map(_packed),
                like(_described()).map(manifests.to_bytes),
            ),
            "pack": st.one_of(
                damaged(_pack_files()[PACK]),
                damaged(_pack_body()).map(_signed),
                edited(),
                like(_pack_described()).map(signed_pack),
            ),
        }
        self.run: dict[str, Callable[[Any], None]] = {
            "gguf": self._gguf,
            "safetensors": self._shard,
            "index": self._directory,
            "manifest": lambda data: void(manifests.from_bytes(data)),
            "pack": self._pack_folder,
        }

    def try_one(self, reader: str, value: Any) -> None:
        """Reads one input. Any error but ours comes out."""
        try:
            self.run[reader](value)
        except (CoordinatorError, GeometryError) as error:
            sentence = str(error)
            assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 1000, sentence
            self.outcomes[reader, "refused"] += 1
        else:
            self.outcomes[reader, "read"] += 1

    def _gguf(self, data: bytes) -> None:
        path = self._folder / "x.gguf"
        path.write_bytes(data)
        file = open_gguf(path)
        for tensor in file.tensors.values():
            assert tensor.stored.begin + tensor.stored.nbytes <= len(data)
        read_config(file)

    def _shard(self, value: tuple[str, bytes]) -> None:
        quantization, data = value
        path = self._folder / "model.safetensors"
        path.write_bytes(data)
        tensors, _ = read_header(path)
        for tensor in tensors.values():
            assert tensor.begin + tensor.nbytes <= len(data)
        method = method_of(path, {"quantization_config": {"quant_method": quantization, "bits": 4}})
        assert method is not None
        for tensor in ordinary_tensors(path, tensors, method, torch.bfloat16).values():
            if 0 < np.prod(tensor.shape, dtype=float) < 1e5:
                tensor.read()

    def _directory(self, value: tuple[Any, Any, int]) -> None:
        index, config, cut = value
        folder = self._folder / "directory"
        folder.mkdir(exist_ok=True)
        (folder / INDEX).write_text(json.dumps(index)[: -cut or None])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "a.safetensors").write_bytes(_safetensors("fp8"))
        directory = open_directory(folder)
        method_of(folder, directory.config)

    def _pack_folder(self, data: bytes) -> None:
        folder = self._folder / "pack"
        if not folder.exists():
            for name, contents in _pack_files().items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(contents)
        (folder / PACK).write_bytes(data)
        _lay_experts(folder, data)
        read_manifest(folder)
        open_model(str(folder), Outlines(self._folder / "outlines"))

    def _shards(self, method: str) -> Any:
        """Files that are quantized in one way, with its name."""
        whole = _safetensors(method)
        length = int.from_bytes(whole[:8], "little")
        body = whole[8 + length :]

        def file(header: Any) -> bytes:
            raw = json.dumps(header).encode()
            return len(raw).to_bytes(8, "little") + raw + body

        headers = changed(json.loads(whole[8 : 8 + length])).map(file)
        numbers = st.binary(min_size=len(body), max_size=len(body)).map(lambda data: whole[: 8 + length] + data)
        return st.tuples(st.just(method), st.one_of(st.binary(max_size=200), damaged(whole), headers, numbers))


def void(_: object) -> None:
    """Drops a result."""


def fuzz(reader: str, inputs: int, folder: Path) -> tuple[Counter[tuple[str, str]], int]:
    """Runs one reader on many inputs, and raises the first error that is not ours.

    Returns what became of them, and the most bytes that this process held beyond what it held before.
    """
    readers = Readers(folder)

    @settings(
        max_examples=inputs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(value=readers.inputs[reader])
    def one(value: Any) -> None:
        readers.try_one(reader, value)

    # What was held once, and given back, would hide as much: the peak begins anew (proc(5), clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_bytes()
    one()
    return readers.outcomes, _peak_bytes() - before


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))


def _lay_experts(folder: Path, data: bytes) -> None:
    """Gives the files of a pack's experts the sizes that its manifest claims, so that more than these decides."""
    try:
        layers = manifests.from_bytes(msgpack.unpackb(msgpack.unpackb(data)["body"])["manifest"]).layers
    except Exception:  # it claims nothing
        return
    for number, nbytes in enumerate(offsets(layer)[-1] for layer in layers):
        with (folder / file_name(number)).open("ab") as file:
            file.truncate(min(nbytes, LARGEST_FILE))


READERS = ("gguf", "safetensors", "index", "manifest", "pack")
_CONFIG = {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"x.weight": "a.safetensors", "plain": "a.safetensors"}}
# What a checkpoint of each method holds, by the method's name: all of it can be read.
_STORED: dict[str, dict[str, torch.Tensor]] = {
    "fp8": {
        "x.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn),
        "x.weight_scale_inv": torch.ones(1, 1),
    },
    "gptq": {
        "x.qweight": torch.zeros(4, 8, dtype=torch.int32),
        "x.qzeros": torch.zeros(1, 1, dtype=torch.int32),
        "x.scales": torch.ones(1, 8, dtype=torch.float16),
        "x.g_idx": torch.zeros(32, dtype=torch.int32),
    },
    "awq": {
        "x.qweight": torch.zeros(32, 4, dtype=torch.int32),
        "x.qzeros": torch.zeros(1, 4, dtype=torch.int32),
        "x.scales": torch.ones(1, 32, dtype=torch.float16),
    },
    "compressed-tensors": {
        "x.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
        "x.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
        "x.weight_shape": torch.tensor([8, 32]),
        "y.weight": torch.zeros(8, 32, dtype=torch.int8),
        "y.weight_scale": torch.ones(8, 1),
        "w.weight_packed": torch.zeros(8, 8, dtype=torch.int32),
        "w.weight_scale": torch.ones(8, 2, dtype=torch.bfloat16),
        "w.weight_shape": torch.tensor([8, 32]),
        "w.weight_zero_point": torch.zeros(2, 2, dtype=torch.int32),
        "z.weight_packed": torch.zeros(8, 16, dtype=torch.uint8),
        "z.weight_scale": torch.full((8, 1), 127, dtype=torch.uint8),
    },
    "mxfp4": {
        "x_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
        "x_scales": torch.full((2, 4, 1), 127, dtype=torch.uint8),
    },
}


@functools.cache
def _gguf_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        writer = gguf.GGUFWriter(path, "qwen3moe")
        numbers = {"block_count": 2, "context_length": 64, "embedding_length": 32, "expert_count": 2}
        numbers |= {"attention.head_count": 2, "expert_used_count": 1, "expert_feed_forward_length": 32}
        for key, number in numbers.items():
            writer.add_uint32(f"qwen3moe.{key}", number)
        writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6)
        writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
        writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
        blocks = gguf.quantize(np.ones((2, 8, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.ffn_up_exps.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@functools.cache
def _safetensors(method: str) -> bytes:
    return save(_STORED[method] | {"plain": torch.zeros(3)})


def _described() -> Manifest:
    spec = ExpertSpec(hidden_size=32, intermediate_size=32, activation="silu", format="q8_0", down_format="q4_0")
    return Manifest("x", "0" * 64, (LayerGeometry(4, 2, spec),) * 3)


def _packed(value: Any) -> bytes:
    try:
        return bytes(msgpack.packb(value))
    except (OverflowError, ValueError):
        return b""


@functools.cache
def _pack_files() -> dict[str, bytes]:
    """The files of a small model's pack, by their names."""
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_local_experts=4,
        num_experts_per_tok=2, num_attention_heads=1, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        model, pack = Path(name) / "model", Path(name) / "pack"
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(model)
        convert(open_model(str(model)), pack, "q8_0", workers=1)
        return {str(file.relative_to(pack)): file.read_bytes() for file in pack.rglob("*") if file.is_file()}


def _pack_body() -> bytes:
    return bytes(msgpack.unpackb(_pack_files()[PACK])["body"])


def _pack_described() -> Manifest:
    return manifests.from_bytes(msgpack.unpackb(_pack_body())["manifest"])


def _signed(body: bytes) -> bytes:
    """A pack's manifest around `body`, whose hash is right."""
    return bytes(msgpack.packb({"body": body, "sha256": hashlib.sha256(body).digest()}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for reader in READERS:
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes, growth = fuzz(reader, arguments.inputs // len(READERS), Path(folder))
        refused, read = outcomes[reader, "refused"], outcomes[reader, "read"]
        rows.append(
            {"reader": reader, "inputs": refused + read, "refused": refused, "read": read,
             "seconds": round(time.monotonic() - start, 1), "peak_growth_bytes": growth}
        )  # fmt: skip
        if growth > MEMORY_GROWTH:
            sys.exit(f"{reader} took {growth} bytes more.")
    if arguments.json:
        print(json.dumps({"rows": rows}))
    else:
        for row in rows:
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
