"""No permission, and a full disk: one sentence that names the place, never a traceback."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer

Fill = Callable[[Path, int], Path]
MIB = 1 << 20
COMMAND = [sys.executable, "-m", "moehive.coordinator.cli.main"]
NAME = "organization/tiny-moe"


@pytest.fixture
def sentence(environment: dict[str, str]) -> Callable[..., str]:
    """What a command that fails says: one line."""

    def run(*arguments: str | Path, prefix: list[str] | None = None, **more: str) -> str:
        done = subprocess.run(
            [*(prefix or []), *COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment | more,
            stdin=subprocess.DEVNULL,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert "Traceback" not in done.stderr, done.stderr
        *_, line = done.stderr.strip().splitlines()  # what comes before is progress
        assert line.startswith("moehive: ") and line.endswith("."), line
        return line

    return run


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Callable[[Path, int], Path]]:
    """Changes the mode of a file or folder until the test ends."""
    changed: list[Path] = []

    def close(path: Path, mode: int) -> Path:
        changed.append(path)
        path.chmod(mode)
        return path

    yield close
    for path in reversed(changed):
        path.chmod(0o755)


@pytest.mark.parametrize("what", [".", "config.json", "model.safetensors"])
def test_a_model_directory_that_may_not_be_read(
    what: str, tiny_moe: Path, tmp_path: Path, sentence: Any, closed: Any, unprivileged: list[str]
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_moe.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    closed(model / what, 0)
    said = sentence("convert", model, tmp_path / "pack", prefix=unprivileged)
    assert "cannot be read: Permission denied" in said and str(model) in said


def test_a_gguf_that_may_not_be_read(tmp_path: Path, sentence: Any, closed: Any, unprivileged: list[str]) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    closed(model, 0)
    said = sentence("convert", model, tmp_path / "pack", prefix=unprivileged)
    assert f"{model} cannot be read: Permission denied" in said


def test_a_pack_that_may_not_be_written_or_read(
    tiny_moe: Path, tmp_path: Path, moehive: Any, sentence: Any, closed: Any, unprivileged: list[str]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    closed(target, 0o555)
    said = sentence("convert", tiny_moe, target / "pack", prefix=unprivileged)
    assert "can't be written (Permission denied)" in said and str(target) in said
    target.chmod(0o755)
    assert moehive("convert", str(tiny_moe), str(target / "pack"), "--format", "keep").code == 0
    for name in ("pack.msgpack", "experts-00001.bin", "trunk"):
        closed(target / "pack" / name, 0)
        said = sentence("verify", target / "pack", prefix=unprivileged)
        assert "can't be read" in said and "Permission denied" in said and name in said
        (target / "pack" / name).chmod(0o755)


def test_directories_that_may_not_be_read_are_no_models(
    tiny_moe: Path, tmp_path: Path, closed: Any, environment: dict[str, str], unprivileged: list[str]
) -> None:
    """As lost+found beside the models of a disk."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(tiny_moe)
    (tmp_path / "models" / "lost+found").mkdir()
    closed(tmp_path / "models" / "lost+found", 0)
    command = [*unprivileged, *COMMAND, "models", str(tmp_path / "models"), "--address", "127.0.0.1:1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert [Path(model["path"]).name for model in json.loads(done.stdout)["models"]] == ["tiny"]


def test_a_state_directory_that_may_not_be_written(
    tiny_moe: Path, tmp_path: Path, sentence: Any, closed: Any, unprivileged: list[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    closed(mine, 0o555)
    for command in (["init"], ["up", "--model", str(tiny_moe)], ["coordinator", "--model", str(tiny_moe)]):
        said = sentence(*command, "--state-dir", mine / "state", prefix=unprivileged)
        assert str(mine) in said and ("Permission denied" in said or "moehive init" in said), said


def test_a_hub_cache_that_may_not_be_written(
    tiny_moe: Path, tmp_path: Path, sentence: Any, closed: Any, unprivileged: list[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    closed(mine, 0o555)
    with HubServer({NAME: {file.name: file.read_bytes() for file in tiny_moe.iterdir()}}) as hub:
        said = sentence("pull", NAME, prefix=unprivileged, HF_ENDPOINT=hub.url, HF_HOME=str(mine / "hub"))
    assert "cannot be downloaded: Permission denied" in said


def test_a_full_disk_for_the_state(tiny_moe: Path, small_disk: Path, fill: Fill, sentence: Any, moehive: Any) -> None:
    fill(small_disk, 0)
    for command in (["init"], ["up", "--model", str(tiny_moe)]):
        said = sentence(*command, "--state-dir", small_disk / "state")
        assert str(small_disk) in said and "free" in said and "space" in said, said
    (small_disk / "ballast").unlink()
    assert moehive("init", "--state-dir", str(small_disk / "state")).code == 0


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_a_disk_that_gets_full_while_a_model_is_pulled(
    file: str, tiny_moe: Path, small_disk: Path, fill: Fill, sentence: Any, moehive: Any
) -> None:
    """A small file comes by the hub's own client, a large one by ours; both go on once there is room."""
    files = {file.name: file.read_bytes() for file in tiny_moe.iterdir()}
    files["model.safetensors"] += bytes(MIB)
    where = {"HF_HOME": str(small_disk / "hub"), "HF_HUB_DISABLE_XET": "1"}
    with HubServer({NAME: files}) as hub:
        hub.before = lambda name: name == file and fill(small_disk, 0)
        said = sentence("pull", NAME, HF_ENDPOINT=hub.url, **where)
        assert "cannot be downloaded: No space left on device" in said
        (small_disk / "ballast").unlink()
        hub.before = lambda name: None
        done = moehive("pull", NAME, "--json", HF_ENDPOINT=hub.url, **where)
        assert done.code == 0, done.sentence
        folder = Path(json.loads(done.stdout)["path"])
        assert all((folder / name).read_bytes() == files[name] for name in ("config.json", "model.safetensors"))


def test_a_disk_that_is_too_small_for_a_model(small_disk: Path, fill: Fill, sentence: Any) -> None:
    fill(small_disk, MIB)
    with HubServer({NAME: {"model.gguf": bytes(2 * MIB)}}) as hub:
        said = sentence("pull", NAME, HF_ENDPOINT=hub.url, HF_HOME=str(small_disk / "hub"))
    assert "needs 2.1 MB more" in said and "left; make room" in said


def test_a_disk_that_is_too_small_for_a_pack(tiny_moe: Path, small_disk: Path, fill: Fill, sentence: Any) -> None:
    fill(small_disk, 64 << 10)
    said = sentence("convert", tiny_moe, small_disk / "pack", "--format", "keep")
    assert "takes 256.6 kB more, and its disk has" in said and "kB left: free some space" in said
    assert not (small_disk / "pack").exists()
