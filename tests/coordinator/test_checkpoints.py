"""Checkpoints on disk: layouts that mean the same, what changes the fingerprint, and every way to be broken."""

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moehive.coordinator.bench.load import measure_load
from moehive.coordinator.checkpoints.checkpoint import Checkpoint
from moehive.coordinator.checkpoints.hub import resolve
from moehive.coordinator.checkpoints.safetensors_file import read_header
from moehive.coordinator.types import CoordinatorError
from moehive.kernels.blob import tensor_views
from moehive.kernels.geometry import ExpertId

TinyMoe = Callable[[str], Path]
INDEX = "model.safetensors.index.json"


def blobs(checkpoint: Checkpoint) -> dict[ExpertId, bytes]:
    return {
        ExpertId(layer, expert): checkpoint.expert_blob(ExpertId(layer, expert)).numpy().tobytes()
        for layer, geometry in enumerate(checkpoint.manifest.layers)
        for expert in range(geometry.experts)
    }


@pytest.fixture
def mixtral(tiny_moe: TinyMoe, tmp_path: Path) -> Path:
    """A copy of the tiny mixtral to break."""
    return Path(shutil.copytree(tiny_moe("mixtral"), tmp_path / "mixtral"))


@pytest.fixture
def sharded(tiny_moe: TinyMoe, tmp_path: Path) -> Path:
    """The same model in several shards with an index."""
    model = AutoModelForCausalLM.from_pretrained(tiny_moe("mixtral"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def refusal(folder: Path) -> str:
    """The sentence with which a directory is refused."""
    with pytest.raises(CoordinatorError) as caught:
        Checkpoint.open(folder).load_trunk()
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence
    return sentence


def test_shards_and_fused_tensors_give_the_same_blobs(mixtral: Path, sharded: Path, tmp_path: Path) -> None:
    expected = blobs(Checkpoint.open(mixtral))
    assert blobs(Checkpoint.open(sharded)) == expected

    tensors = load_file(mixtral / "model.safetensors")
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name, parameter in AutoModelForCausalLM.from_pretrained(mixtral).named_parameters():
        if ".experts." in name:
            fused[name] = parameter.detach().clone()
    assert any(name.endswith("experts.gate_up_proj") for name in fused)
    folder = tmp_path / "fused"
    folder.mkdir()
    shutil.copy(mixtral / "config.json", folder)
    save_file(fused, folder / "model.safetensors", {"format": "pt"})
    assert blobs(Checkpoint.open(folder)) == expected


@pytest.mark.parametrize("family", ["gpt_oss", "aria_text", "ernie4_5_vl_moe", "nemotron_h", "muse_spark"])
def test_blobs_hold_the_canonical_layout(family: str, tiny_moe: TinyMoe) -> None:
    """Transposed, interleaved, biased, whole-layer, ungated and normed: against transformers' loaded parameters."""
    folder = tiny_moe(family)
    checkpoint = Checkpoint.open(folder)
    architecture = checkpoint.load_trunk()
    model = type(architecture.model).from_pretrained(folder)
    for ordinal, layer in enumerate(architecture.experts):
        spec = checkpoint.manifest.layers[ordinal].spec
        module = model.get_submodule(layer.name)
        for expert in (0, module.num_experts - 1):
            views = tensor_views(spec, checkpoint.expert_blob(ExpertId(ordinal, expert)))
            up = (module.gate_up_proj if spec.gated else module.up_proj)[expert]
            down = module.down_proj[expert]
            if family in ("gpt_oss", "aria_text"):
                up, down = up.T, down.T
            if family == "gpt_oss":
                up = torch.cat([up[::2], up[1::2]])
                bias = module.gate_up_proj_bias[expert]
                assert torch.equal(views["up_bias"], torch.cat([bias[::2], bias[1::2]]))
                assert torch.equal(views["down_bias"], module.down_proj_bias[expert])
            if family == "muse_spark":
                assert torch.equal(views["post_norm"], module.post_expert_norm.weight + 1)
            assert torch.equal(views["up"], up)
            assert torch.equal(views["down"], down)


@pytest.mark.parametrize("family", ["mixtral", "ernie4_5_vl_moe"])
def test_blobs_from_several_threads_are_the_same(family: str, tiny_moe: TinyMoe) -> None:
    expected = blobs(Checkpoint.open(tiny_moe(family)))
    checkpoint = Checkpoint.open(tiny_moe(family))
    order = list(expected) + list(reversed(expected))
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda expert: checkpoint.expert_blob(expert).numpy().tobytes(), order)
    assert list(found) == [expected[expert] for expert in order]


def test_the_fingerprint_follows_config_and_weights(mixtral: Path) -> None:
    first = Checkpoint.open(mixtral).manifest
    assert Checkpoint.open(mixtral).manifest == first
    tensors = load_file(mixtral / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, mixtral / "model.safetensors", {"format": "pt"})
    second = Checkpoint.open(mixtral).manifest
    config = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    third = Checkpoint.open(mixtral).manifest
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3
    assert first.name == "mixtral"


def test_no_directory(tmp_path: Path) -> None:
    assert "There is no model directory" in refusal(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refusal(tmp_path / "file")
    assert "cannot be read" in refusal(tmp_path / ("x" * 5000))


def test_no_config_or_a_broken_one(mixtral: Path) -> None:
    config = mixtral / "config.json"
    for text, sentence in (("{", "not valid JSON"), ("[" * 100_000, "not valid JSON"), ("[1]", "JSON object")):
        config.write_text(text)
        assert sentence in refusal(mixtral)
    config.unlink()
    assert "no config.json" in refusal(mixtral)
    config.mkdir()
    assert "cannot be read" in refusal(mixtral)


def test_truncated_and_corrupt_files(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for size in (0, 5, 8, header - 1, header, header + 1000, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert "truncated" in refusal(mixtral)
    file.write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    assert "corrupt" in refusal(mixtral)
    file.write_bytes(whole[:8] + b"?" * (header - 8) + whole[header:])
    assert "not JSON" in refusal(mixtral)
    file.unlink()
    assert "has neither" in refusal(mixtral)


def test_a_file_cut_after_opening(mixtral: Path) -> None:
    checkpoint = Checkpoint.open(mixtral)
    file = mixtral / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CoordinatorError, match="truncated"):
        checkpoint.expert_blob(ExpertId(2, 7))
    file.unlink()
    with pytest.raises(CoordinatorError, match="cannot be read"):
        checkpoint.expert_blob(ExpertId(2, 7))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    number = st.one_of(st.integers(-2, 2**70), st.text(max_size=2), st.none(), st.floats())
    entry = st.one_of(
        st.fixed_dictionaries(
            {
                "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "I64"]), number),
                "shape": st.one_of(st.lists(number, max_size=3), number),
                "data_offsets": st.one_of(st.lists(number, max_size=3), number),
            }
        ),
        number,
    )
    header = json.dumps(data.draw(st.dictionaries(st.text(max_size=3), entry, max_size=3))).encode()
    body = data.draw(st.binary(max_size=64))
    raw = data.draw(st.one_of(st.just(len(header).to_bytes(8, "little") + header + body), st.binary(max_size=200)))
    file = tmp_path / "model.safetensors"
    file.write_bytes(raw)
    try:
        tensors, _ = read_header(file)
    except CoordinatorError as error:
        assert "\n" not in str(error).replace(str(file), "")
        return
    for tensor in tensors.values():
        assert tensor.begin + tensor.nbytes <= len(raw)
        assert tuple(tensor.read().shape) == tensor.shape


def test_missing_tensors(mixtral: Path) -> None:
    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    for gone in (
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        *(name for name in tensors if ".experts.3." in name and "layers.0" in name),
    ):
        save_file({name: t for name, t in tensors.items() if name != gone}, file, {"format": "pt"})
        sentence = refusal(mixtral)
        assert gone in sentence or "a tensor is missing" in sentence, (gone, sentence)
    save_file({name: t for name, t in tensors.items() if ".experts." not in name}, file, {"format": "pt"})
    assert "has no tensors for" in refusal(mixtral)


def test_shards_missing_or_outside(sharded: Path, tmp_path: Path) -> None:
    index = sharded / INDEX
    whole = json.loads(index.read_text())
    name = next(iter(whole["weight_map"]))
    shutil.copy(sharded / whole["weight_map"][name], tmp_path / "outside.safetensors")
    for file in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "..", "", 5):
        index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {name: file}}))
        assert "not a file of that directory" in refusal(sharded)
    other = sorted(set(whole["weight_map"].values()) - {whole["weight_map"][name]})[0]
    index.write_text(json.dumps(whole | {"weight_map": whole["weight_map"] | {name: other}}))
    assert "lacks" in refusal(sharded)
    index.write_text("{}")
    assert "no weight_map" in refusal(sharded)
    index.write_text(json.dumps(whole))
    (sharded / other).unlink()
    assert f"lacks {other}" in refusal(sharded)
    index.unlink()
    assert "no model.safetensors.index.json" in refusal(sharded)


def test_pickles_are_refused_unread(mixtral: Path) -> None:
    (mixtral / "model.safetensors").unlink()
    (mixtral / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert "pickle" in refusal(mixtral)


@pytest.mark.parametrize(
    "name", ["/no/such/dir", "./x", "../x/y", "x", "a/b/c", "~nobody/x", "a/..", "-a/b", "a b/c"]
)
def test_paths_are_never_sent_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("moehive.coordinator.checkpoints.hub.snapshot_download", download)
    with pytest.raises(CoordinatorError, match="no model directory"):
        resolve(name)


def test_a_hub_id_offline_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CoordinatorError, match="the hub cannot be reached"):
        resolve("some-organization/some-model")
    assert resolve(str(tmp_path)) == tmp_path


def test_loading_keeps_to_its_memory_limit(tiny_moe: TinyMoe) -> None:
    report = measure_load(tiny_moe("qwen3_moe"))
    assert report.within_limit
    assert report.peak_rss_bytes > report.trunk_bytes > 0
