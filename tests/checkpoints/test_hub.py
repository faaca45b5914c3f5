"""`moehive pull` and `moehive models` against a server that speaks the hub's API."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from safetensors.torch import load_file, save_file

from moehive.coordinator.checkpoints.hub_files import HubFile, needed_files
from moehive.coordinator.types import CoordinatorError

NAME = "organization/tiny-moe"


@pytest.fixture(scope="module")
def files(wide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository: two shards with their index, a shard of nobody's, a pickle, another framework's weights."""
    source = wide("mixtral")
    folder = tmp_path_factory.mktemp("repository")
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, held in parts.items() for name in held}}
    found = {file: (folder / file).read_bytes() for file in parts}
    return found | {
        "config.json": (source / "config.json").read_bytes(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        "consolidated.safetensors": b"x" * 5000,
        "stray.safetensors": b"x" * 5000,
        "pytorch_model.bin": b"x" * 5000,
        "README.md": b"x",
        "original/params.json": b"{}",
    }


def run(home: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"MOEHIVE_HOME": str(home / "moehive"), "NO_COLOR": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def pulled(home: Path, url: str, model: str = NAME) -> Path:
    done = run(home, url, "pull", model, "--json")
    assert done.returncode == 0, done.stderr
    return Path(json.loads(done.stdout)["path"])


def test_only_what_is_needed_comes_once_and_is_listed(files: dict[str, bytes], tmp_path: Path) -> None:
    with HubServer({NAME: files}) as hub:
        folder = pulled(tmp_path, hub.url)
        held = sorted(path.name for path in folder.iterdir())
        assert held == sorted([*[name for name in files if name.startswith("model")], "config.json"])
        sent = dict(hub.sent)
        for name in held:
            assert (folder / name).read_bytes() == files[name]
        assert pulled(tmp_path, hub.url) == folder
        assert {name: count for name, count in hub.sent.items() if name.startswith("model-")} == {
            name: count for name, count in sent.items() if name.startswith("model-")
        }
    gone = hub.url  # nobody answers there any more: what is cached is used
    assert pulled(tmp_path, gone) == folder
    listed = run(tmp_path, gone, "models", "--json", "--address", "127.0.0.1:9")
    assert listed.returncode == 0, listed.stderr
    (row,) = json.loads(listed.stdout)["models"]
    assert (row["name"], row["kind"], row["fits"], row["formats"]) == (NAME, "safetensors", True, ["bf16"])
    weights = sum(len(data) for name, data in files.items() if name.startswith("model-"))
    assert 0.9 * weights < row["expert_bytes"] + row["trunk_bytes"] <= weights
    table = run(tmp_path, gone, "models", "--address", "127.0.0.1:9")
    assert NAME in table.stdout and "yes" in table.stdout


def test_a_cut_download_goes_on_where_it_was_cut(files: dict[str, bytes], tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    size = len(files[name])
    with HubServer({NAME: files}) as hub:
        hub.cut_after, hub.replies_until_cut = size // 3, 1
        broken = run(tmp_path, hub.url, "pull", NAME)
        assert broken.returncode == 1
        assert "broke off" in broken.stderr and "Traceback" not in broken.stderr
        assert hub.sent[name] == size // 3
        hub.replies_until_cut = None  # each reply is cut, and the next goes on
        folder = pulled(tmp_path, hub.url)
        assert (folder / name).read_bytes() == files[name]
        assert hub.sent[name] == size
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_leaves_what_the_next_run_takes_up(files: dict[str, bytes], tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    size, asked = len(files[name]), Counter[str]()
    with HubServer({NAME: files}) as hub:

        def interrupt(file: str) -> None:
            asked[file] += 1
            if file == name and asked[file] == 2:  # a third of it has come
                process.send_signal(signal.SIGINT)
                process.wait(60)

        hub.cut_after, hub.before = size // 3, interrupt
        command = [sys.executable, "-m", "moehive.coordinator.cli.main", "pull", NAME]
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            _, said = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in said, said
    (part,) = tmp_path.glob("**/*.part")
    have = part.stat().st_size
    assert size // 3 <= have < size
    with HubServer({NAME: files}) as hub:
        assert (pulled(tmp_path, hub.url) / name).read_bytes() == files[name]
        assert hub.sent[name] == size - have


def test_a_part_that_was_damaged_on_disk_is_fetched_anew(files: dict[str, bytes], tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    with HubServer({NAME: files}) as hub:
        hub.cut_after, hub.replies_until_cut = 10_000, 1
        assert run(tmp_path, hub.url, "pull", NAME).returncode == 1
        (part,) = tmp_path.glob("**/*.part")
        part.write_bytes(b"?" * 10_000)
        hub.cut_after = None
        assert (pulled(tmp_path, hub.url) / name).read_bytes() == files[name]


def test_contents_of_another_hash_never_count(files: dict[str, bytes], tmp_path: Path) -> None:
    with HubServer({NAME: files}) as hub:
        hub.damage = "model-00002-of-00002.safetensors"
        refused = run(tmp_path, hub.url, "pull", NAME)
        assert refused.returncode == 1
        assert "another hash" in refused.stderr and "Traceback" not in refused.stderr
        assert not list(tmp_path.glob("**/snapshots/*/model-00002-of-00002.safetensors"))
        hub.damage = None
        pulled(tmp_path, hub.url)


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", "is gated on the hub: accept its terms there, then log in with `hf auth login`."),
        (403, "GatedRepo", "is gated on the hub: accept its terms there, then log in with `hf auth login`."),
        (401, "RepoNotFound", "check the name, or log in with `hf auth login` if it is private."),
        (503, "", "broke off (Server error '503 Service Unavailable' for url"),
    ],
)
def test_weights_that_the_hub_does_not_give(status: int, code: str, said: str, tmp_path: Path) -> None:
    """It lists the files of a gated model to everybody, and refuses them one by one."""
    with HubServer({NAME: {"model.gguf": b"x" * 100}}) as hub:
        hub.refused[NAME] = status, code
        refused = run(tmp_path, hub.url, "pull", NAME)
    assert refused.returncode == 1
    (sentence,) = refused.stderr.splitlines()
    assert said in sentence and ("run it again" in sentence) == (status == 503)


def test_a_hash_that_is_a_path_names_no_file(files: dict[str, bytes], tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    theirs = tmp_path / "theirs.moehive.part"
    theirs.write_bytes(b"precious")
    with HubServer({NAME: files}) as hub:
        hub.hashes["model-00002-of-00002.safetensors"] = str(theirs).removesuffix(".moehive.part")
        refused = run(home, hub.url, "pull", NAME)
    assert refused.returncode == 1
    assert "names no SHA-256 for model-00002-of-00002.safetensors" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert theirs.read_bytes() == b"precious"


def test_one_of_several_ggufs_is_chosen_by_its_quantization(tmp_path: Path) -> None:
    held = {
        "Tiny-Q4_K_M.gguf": b"a" * 1000,
        "Tiny-Q8_0.gguf": b"b" * 1000,
        "UD-Q2_K_XL/Tiny-UD-Q2_K_XL-00001-of-00002.gguf": b"c" * 1000,
        "UD-Q2_K_XL/Tiny-UD-Q2_K_XL-00002-of-00002.gguf": b"d" * 1000,
        "mmproj-F16.gguf": b"e" * 1000,
        "imatrix.gguf": b"f" * 10,
    }
    with HubServer({NAME: held}) as hub:
        assert pulled(tmp_path, hub.url, f"{NAME}:q4_k_m").name == "Tiny-Q4_K_M.gguf"
        assert set(hub.sent) == {"Tiny-Q4_K_M.gguf"}
        first = pulled(tmp_path, hub.url, f"{NAME}:UD-Q2_K_XL")
        assert first.name == "Tiny-UD-Q2_K_XL-00001-of-00002.gguf"
        assert first.with_name("Tiny-UD-Q2_K_XL-00002-of-00002.gguf").read_bytes() == b"d" * 1000
        many = run(tmp_path, hub.url, "pull", NAME)
        assert "3 GGUF models" in many.stderr and "Q4_K_M, Tiny" not in many.stderr and "Q8_0" in many.stderr
        none = run(tmp_path, hub.url, "pull", f"{NAME}:Q3_K_S")
        assert "has no GGUF model 'Q3_K_S'" in none.stderr
        nobody = run(tmp_path, hub.url, "pull", "organization/nothing")
        assert "nor such a model on the hub" in nobody.stderr
        listed = json.loads(run(tmp_path, hub.url, "models", "--json", "--address", "127.0.0.1:9").stdout)
        assert {row["name"] for row in listed["models"]} == {
            f"{NAME}:Tiny-Q4_K_M", f"{NAME}:Tiny-UD-Q2_K_XL",
        }  # fmt: skip
        assert all(row["problem"] and not row["fits"] for row in listed["models"])


def files_of(*names: str) -> list[Any]:
    return [HubFile(name, 100, None) for name in names]


def test_repositories_without_a_model_are_refused(tmp_path: Path) -> None:
    def fetch(name: str) -> Path:
        (tmp_path / name).write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
        return tmp_path / name

    with pytest.raises(CoordinatorError, match="pickle"):
        needed_files(NAME, files_of("config.json", "pytorch_model.bin"), None, fetch)
    with pytest.raises(CoordinatorError, match="no model"):
        needed_files(NAME, files_of("README.md"), None, fetch)
    with pytest.raises(CoordinatorError, match=f"no GGUF models to choose from; write {NAME}"):
        needed_files(NAME, files_of("config.json", "model.safetensors"), "Q4_K_M", fetch)
    with pytest.raises(CoordinatorError, match="not a file of that directory"):
        index = files_of("config.json", "model.safetensors", "model.safetensors.index.json")
        needed_files(NAME, index, None, fetch)
