"""Hostile input for every reader of files: valid ones, damaged in many ways. Run it for many inputs:

    python tests/checkpoints/fuzz.py [--inputs 20000] [--json]

Each input must be read, or refused with an error of ours in one sentence; memory must not follow what a file claims.
"""

import argparse
import functools
import hashlib
import json
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import msgpack
import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from moehive.coordinator.checkpoints.directory import open_directory
from moehive.coordinator.checkpoints.gguf.config import read_config
from moehive.coordinator.checkpoints.gguf.file import open_gguf
from moehive.coordinator.checkpoints.json_files import INDEX
from moehive.coordinator.checkpoints.pack.manifest import NAME as PACK
from moehive.coordinator.checkpoints.pack.manifest import PackManifest, TrunkPart, read_manifest, write_manifest
from moehive.coordinator.checkpoints.quantized.find import ordinary_tensors
from moehive.coordinator.checkpoints.quantized.method import method_of
from moehive.coordinator.checkpoints.safetensors_file import read_header
from moehive.coordinator.types import CoordinatorError
from moehive.kernels import manifest as manifests
from moehive.kernels.geometry import ExpertSpec, GeometryError, LayerGeometry, Manifest

MEMORY_GROWTH = 256 << 20  # bytes that thousands of inputs may add to the peak
EDGES = (0, 1, 2, 7, 8, 9, 31, 32, 127, 128, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


@st.composite
def damaged(draw: Any, whole: bytes) -> bytes:
    """`whole` with up to four changes: numbers set to edges, bytes changed, pieces cut out, doubled or inserted."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
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


class Readers:
    """Each reader with valid files to damage, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.inputs: dict[str, Any] = {
            "gguf": st.one_of(st.binary(max_size=200), damaged(_gguf_file())),
            "safetensors": st.one_of(st.binary(max_size=200), damaged(_safetensors()), self._headers()),
            "index": st.tuples(changed(_INDEX), changed(_CONFIG), st.integers(0, 3)),
            "manifest": st.one_of(st.binary(max_size=200), damaged(_manifest()), VALUES.map(_packed)),
            "pack": st.one_of(damaged(_signed(_pack_body())), damaged(_pack_body()).map(_signed)),
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

    def _shard(self, data: bytes) -> None:
        path = self._folder / "model.safetensors"
        path.write_bytes(data)
        tensors, _ = read_header(path)
        for tensor in tensors.values():
            assert tensor.begin + tensor.nbytes <= len(data)
        refused = None
        for quantization in _METHODS:
            method = method_of(path, {"quantization_config": quantization})
            assert method is not None
            try:
                found = ordinary_tensors(path, tensors, method, torch.bfloat16)
            except CoordinatorError as error:
                refused = error
                continue
            for tensor in found.values():
                if 0 < np.prod(tensor.shape, dtype=float) < 1e5 and len(tensor.shape) == 2:
                    try:
                        tensor.read()
                    except CoordinatorError as error:
                        refused = error
        if refused is not None:
            raise refused

    def _directory(self, value: tuple[Any, Any, int]) -> None:
        index, config, cut = value
        folder = self._folder / "directory"
        folder.mkdir(exist_ok=True)
        (folder / INDEX).write_text(json.dumps(index)[: -cut or None])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "a.safetensors").write_bytes(_safetensors())
        directory = open_directory(folder)
        method_of(folder, directory.config)

    def _pack_folder(self, data: bytes) -> None:
        folder = self._folder / "pack"
        folder.mkdir(exist_ok=True)
        (folder / PACK).write_bytes(data)
        read_manifest(folder)

    def _headers(self) -> Any:
        whole = _safetensors()
        length = int.from_bytes(whole[:8], "little")
        body = whole[8 + length :]

        def file(header: Any) -> bytes:
            raw = json.dumps(header).encode()
            return len(raw).to_bytes(8, "little") + raw + body

        return changed(json.loads(whole[8 : 8 + length])).map(file)


def void(_: object) -> None:
    """Drops a result."""


def fuzz(reader: str, inputs: int, folder: Path) -> Counter[tuple[str, str]]:
    """Runs one reader on many inputs, and raises the first error that is not ours."""
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

    one()
    return readers.outcomes


READERS = ("gguf", "safetensors", "index", "manifest", "pack")
_CONFIG = {"model_type": "mixtral", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_INDEX = {"metadata": {"total_size": 1}, "weight_map": {"x.weight": "a.safetensors", "y.qweight": "a.safetensors"}}
_METHODS = (
    {"quant_method": "fp8"},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors"},
)


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
def _safetensors() -> bytes:
    words, scales = torch.zeros(8, 4, dtype=torch.int32), torch.ones(1, 32, dtype=torch.float16)
    return save(
        {
            "x.weight": torch.zeros(8, 8, dtype=torch.float8_e4m3fn),
            "x.weight_scale_inv": torch.ones(1, 1),
            "y.qweight": words,
            "y.qzeros": torch.zeros(1, 4, dtype=torch.int32),
            "y.scales": scales,
            "z.weight_packed": torch.zeros(8, 4, dtype=torch.int32),
            "z.weight_scale": torch.ones(8, 1, dtype=torch.bfloat16),
            "z.weight_shape": torch.tensor([8, 32]),
            "w.weight": torch.zeros(8, 32, dtype=torch.int8),
            "w.weight_scale": torch.ones(8, 1),
            "e_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8),
            "e_scales": torch.zeros(2, 4, 1, dtype=torch.uint8),
            "plain": torch.zeros(3),
        }
    )


def _described() -> Manifest:
    spec = ExpertSpec(hidden_size=32, intermediate_size=32, activation="silu", format="q8_0", down_format="q4_0")
    return Manifest("x", "0" * 64, (LayerGeometry(4, 2, spec),) * 3)


def _manifest() -> bytes:
    return manifests.to_bytes(_described())


def _packed(value: Any) -> bytes:
    try:
        return bytes(msgpack.packb(value))
    except (OverflowError, ValueError):
        return b""


@functools.cache
def _pack_body() -> bytes:
    described = _described()
    hashes = tuple(bytes(32 * layer.experts) for layer in described.layers)
    pack = PackManifest(described, bytes(32), hashes, "", "0" * 64, (TrunkPart("config.json", 2, bytes(32)),))
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), pack)
        outer = msgpack.unpackb((Path(folder) / PACK).read_bytes())
    return bytes(outer["body"])


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
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = fuzz(reader, arguments.inputs // len(READERS), Path(folder))
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
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
