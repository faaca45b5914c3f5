"""Files and directories that are wrong, each refused in one sentence that says what and where."""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.config import read_config
from moehive.coordinator.checkpoints.directory import open_directory
from moehive.coordinator.checkpoints.gguf.config import Metadata
from moehive.coordinator.checkpoints.gguf.file import GgufFile, open_gguf
from moehive.coordinator.checkpoints.gguf.formats import TYPES
from moehive.coordinator.checkpoints.gguf.other_types import why_not_read
from moehive.coordinator.checkpoints.pack.manifest import read_manifest
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError

Wide = Callable[[str], Path]


def refusal(opening: Callable[[], object]) -> str:
    with pytest.raises(CoordinatorError) as caught:
        opening()
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.fixture
def copy(wide: Wide, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wide("mixtral"), tmp_path / "model"))


def test_links_out_of_the_directory(copy: Path, tmp_path: Path) -> None:
    """A link to a file of this user's that a pack would copy, or a node would be sent."""
    (tmp_path / "secret").write_text("{}")
    for name in ("tokenizer.json", "chat_template.jinja"):
        (copy / name).symlink_to(tmp_path / "secret")
        assert "leads out of" in refusal(lambda: Checkpoint.open(copy))
        (copy / name).unlink()
    shutil.move(copy / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (copy / "model.safetensors").symlink_to(Path("..") / "elsewhere.safetensors")
    assert "leads out of" in refusal(lambda: Checkpoint.open(copy))
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors").symlink_to("model.safetensors")
    assert refusal(lambda: Checkpoint.open(copy))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_the_place_of_a_file(name: str, copy: Path, tmp_path: Path) -> None:
    """Whoever opens one waits for ever."""
    (copy / name).unlink(missing_ok=True)
    os.mkfifo(copy / name)
    assert "is a pipe, a device or a socket" in refusal(lambda: Checkpoint.open(copy))
    os.mkfifo(tmp_path / "model.gguf")
    os.mkfifo(tmp_path / "pack.msgpack")
    assert "is a pipe" in refusal(lambda: open_gguf(tmp_path / "model.gguf"))
    assert "is a pipe" in refusal(lambda: read_manifest(tmp_path))


def test_links_of_the_hub_s_cache_are_its_own(copy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--o--m"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.move(copy / name, repository / "blobs" / name.upper())
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / name.upper())
    assert open_directory(snapshot).tensors
    (tmp_path / "linked").symlink_to(snapshot)  # the user's own name for it
    assert open_directory(tmp_path / "linked").tensors


def split_gguf(folder: Path) -> tuple[Path, Path]:
    parts = []
    for number, name in ((1, "token_embd.weight"), (2, "output.weight")):
        parts.append(folder / f"x-{number:05d}-of-00002.gguf")
        writer = gguf.GGUFWriter(parts[-1], "qwen3moe")
        writer.add_tensor(name, np.zeros((4, 64), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts[0], parts[1]


def test_links_of_a_split_gguf_out_of_its_directory(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    first, second = split_gguf(model)
    assert len(open_gguf(first).tensors) == 2
    shutil.move(second, tmp_path / "elsewhere.gguf")
    second.symlink_to(tmp_path / "elsewhere.gguf")
    sentence = refusal(lambda: open_gguf(first))
    assert str(second) in sentence and "leads out of the model's directory" in sentence
    shutil.move(first, tmp_path / "first.gguf")
    first.symlink_to(Path("..") / "first.gguf")  # both lie there: whoever names one means that
    assert len(open_gguf(first).tensors) == 2


def test_links_of_a_split_gguf_in_the_hub_s_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "0123" / "Q4_K_M"
    snapshot.mkdir(parents=True)
    for number, part in enumerate(split_gguf(snapshot)):
        shutil.move(part, tmp_path / "blobs" / str(number))
        part.symlink_to(Path("../../../blobs") / str(number))
    assert len(open_gguf(part).tensors) == 2


def test_a_config_or_index_as_large_as_weights(copy: Path) -> None:
    with (copy / "config.json").open("r+b") as file:
        file.truncate(10 << 30)  # a hole; nothing of it may be read
    assert "far too many" in refusal(lambda: Checkpoint.open(copy))


@pytest.mark.parametrize("layers", [1025, 2**31, 10**30, 1e30])
def test_a_config_with_more_layers_than_any_model(layers: float, copy: Path) -> None:
    """Each layer is built, so such a config would take hours or all memory."""
    config = json.loads((copy / "config.json").read_text())
    for changed in ({"num_hidden_layers": layers}, {"vision_config": {"depth": layers}}):
        (copy / "config.json").write_text(json.dumps(config | changed))
        assert "at most 1024 layers" in refusal(lambda: Checkpoint.open(copy))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["rope_theta", "rms_norm_eps", "routed_scaling_factor"])
def test_a_config_with_a_factor_that_is_none(name: str, value: float, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for changed in ({name: value}, {"text_config": {"rope_parameters": {name: value}}}):
        (copy / "config.json").write_text(json.dumps(config | changed))
        said = refusal(lambda: Checkpoint.open(copy))
        assert "config.json" in said and ("NaN is no number" if math.isnan(value) else f"{name} = {value}") in said


def test_a_config_with_a_limit_that_is_none(copy: Path) -> None:
    """As published for some families: {"time_step_limit": [0.0, Infinity]}."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, math.inf]}))
    assert "Infinity" in (copy / "config.json").read_text()
    assert Checkpoint.open(copy).family == "mixtral"


@pytest.mark.parametrize("key", ["rope.freq_base", "attention.layer_norm_rms_epsilon"])
def test_a_gguf_with_a_factor_that_is_none(key: str, tmp_path: Path) -> None:
    metadata = {"general.architecture": "llama", f"llama.{key}": math.nan}
    said = refusal(lambda: Metadata(GgufFile(tmp_path / "x.gguf", metadata, {}, "")).number(key))
    assert f"llama.{key} = nan, which cannot be" in said


def test_a_folder_of_ggufs(tmp_path: Path) -> None:
    """Which of them is meant, nobody can know."""
    first, _ = split_gguf(tmp_path)
    assert refusal(lambda: Checkpoint.open(tmp_path)).endswith(f"name the file of the model, as {first}.")


@pytest.mark.parametrize("change", [{"head_dim": 16, "num_attention_heads": 2}, {"vocab_size": 64}])
def test_a_config_of_other_shapes_than_the_tensors(change: dict[str, int], copy: Path) -> None:
    """Nothing of the trunk is read beyond its end, however the lean trunk's kernels see the config."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    assert "they do not belong together" in refusal(lambda: Checkpoint.open(copy).trunk_tensors())


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("deepseek_v3", {"n_group": 3}, "can't be chosen from 1 of 3 groups"),
        ("deepseek_v3", {"n_group": 8}, "can't be chosen from 1 of 8 groups"),  # of one expert each
        ("deepseek_v3", {"n_group": None}, "of None groups"),
        ("deepseek_v3", {"topk_group": 2}, "from 2 of 1 groups"),
        ("deepseek_v3", {"norm_topk_prob": None}, "does not describe a deepseek_v3 model"),
        ("qwen3_5_moe_text", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "can't be turned of heads of"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": 1e12}}, "can't be turned of heads of"),
    ],
)
def test_a_config_that_cannot_be_computed(
    family: str, change: dict[str, Any], said: str, families_module: ModuleType, tmp_path: Path
) -> None:
    """It is said when the model is loaded, not by each request."""
    families_module.make_checkpoint(family, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config))
    sentence = refusal(lambda: load_trunk(Checkpoint.open(tmp_path / "model"), 1))
    assert said in sentence and str(tmp_path) in sentence


def gguf_file(path: Path) -> bytes:
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


NAME = b"token_embd.weight"
# The tensor's description after its name: dimensions (4 bytes), sizes (8 each), type (4), offset (8).
CASES = {
    "magic": (0, b"GGML", "not a GGUF file"),
    "version": (4, struct.pack("<I", 99), "version 99"),
    "big-endian": (4, struct.pack(">I", 3), "big-endian"),
    "tensors": (8, struct.pack("<Q", 2**60), "truncated or corrupt"),
    "values": (16, struct.pack("<Q", 2**60), "truncated or corrupt"),
}
AFTER_NAME = {
    "no dimensions": (0, struct.pack("<I", 0), "0 dimensions"),
    "many dimensions": (0, struct.pack("<I", 2**31), "dimensions"),
    "negative size": (4, struct.pack("<q", -64), "truncated or corrupt"),
    "huge size": (12, struct.pack("<Q", 2**62), "truncated or corrupt"),
    "huge sizes that overflow": (4, struct.pack("<QQ", 2**33, 2**33), "truncated or corrupt"),
    "empty": (12, struct.pack("<Q", 0), "empty"),
    "unknown type": (20, struct.pack("<I", 4242), "number 4242"),
    "removed type": (20, struct.pack("<I", 4), "type Q4_2 (number 4), which is not read; get the model in Q4_K_M"),
    "newer type": (20, struct.pack("<I", 40), "llama.cpp's type NVFP4 (number 40)"),
    "another program's type": (20, struct.pack("<I", 138), "ik_llama.cpp's type IQ3_K (number 138)"),
    "what to get instead": (20, struct.pack("<I", 397), "get the model in Q8_0, or make that with llama-quantize"),
    "offset beyond the file": (24, struct.pack("<Q", 2**40), "does not lie within it"),
    "offset that is not aligned": (24, struct.pack("<Q", 1), "does not lie within it"),
    "offset that overflows": (24, struct.pack("<Q", 2**64 - 32), "does not lie within it"),
}


def test_each_type_of_the_gguf_package_is_read_or_named() -> None:
    for kind in gguf.GGMLQuantizationType:
        assert kind in TYPES or f" {kind.name} (number {int(kind)})" in why_not_read(kind)


@pytest.mark.parametrize("case", [*CASES, *AFTER_NAME])
def test_a_gguf_that_lies(case: str, tmp_path: Path) -> None:
    data = bytearray(gguf_file(tmp_path / "x.gguf"))
    open_gguf(tmp_path / "x.gguf")
    if case in CASES:
        at, new, words = CASES[case]
    else:
        at, new, words = AFTER_NAME[case]
        at += data.index(NAME) + len(NAME)
    data[at : at + len(new)] = new
    (tmp_path / "x.gguf").write_bytes(data)
    assert words in refusal(lambda: open_gguf(tmp_path / "x.gguf"))


def test_a_safetensors_header_that_lies(copy: Path) -> None:
    file = copy / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    lies = [
        {"shape": [-1, 4]},
        {"shape": [2**62, 2**62]},
        {"shape": [1.5]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-4, 4]},
        {"data_offsets": [100, 0]},
        {"dtype": "I4"},
        {"dtype": ["F32"]},
        {"dtype": None},
    ]
    for lie in lies:
        raw = json.dumps(header | {name: header[name] | lie}).encode()
        file.write_bytes(len(raw).to_bytes(8, "little") + raw + whole[8 + length :])
        assert refusal(lambda: open_directory(copy)), lie


def test_a_factor_is_refused_however_deep_it_lies(tmp_path: Path) -> None:
    part: dict[str, Any] = {"rope_theta": -1}
    for _ in range(5_000):  # deeper than Python calls
        part = {"a": part}
    with pytest.raises(CoordinatorError, match="rope_theta = -1, which cannot be"):
        read_config(tmp_path, {"model_type": "mixtral"} | part)
