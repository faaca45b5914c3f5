"""`moehive convert --budget`: a pack whose experts and trunk differ in their formats, and keeps within its bytes."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from moehive.coordinator.bench import budget
from moehive.coordinator.checkpoints.inventory import look
from moehive.coordinator.checkpoints.opening import open_model
from moehive.coordinator.checkpoints.pack.checkpoint import PackCheckpoint
from moehive.coordinator.checkpoints.pack.verify import verify
from moehive.coordinator.cli import packs
from moehive.coordinator.cli.budget import budget_bytes
from moehive.coordinator.estimate.cluster import Cluster, Machine, Tier, write_cluster
from moehive.coordinator.estimate.constants import CONTEXT_TOKENS, COORDINATOR_BYTES
from moehive.coordinator.estimate.headers import of_files
from moehive.coordinator.precision.choice import BudgetChoice, choose_formats
from moehive.coordinator.precision.kept_choice import kept_choice
from moehive.coordinator.precision.text import calibration_texts
from moehive.coordinator.serving.text import Text
from moehive.coordinator.trunk import load_trunk
from moehive.coordinator.types import CoordinatorError

FEW = ("q3_k", "iq4_nl", "q8_0")  # a choice among these takes half the time of one among all


def run(*arguments: str | int | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moehive.coordinator.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


def test_formats_are_chosen_for_the_bytes(chat_model: Path, tmp_path: Path, text: Path) -> None:
    source = open_model(str(chat_model))
    size = sum(path.stat().st_size for path in chat_model.glob("*.safetensors"))
    limit = size // 3
    pack = tmp_path / "pack"
    done = run("convert", chat_model, pack, "--budget", limit, "--calibration", text, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["budget_bytes"] == limit and made["expected_nats_a_token"] > 0
    assert 0 <= made["gap"] < 0.2  # of some hundred parts one may be a step short
    trunk = sum((pack / "trunk" / name).stat().st_size for name in ("model.safetensors", "matrices.bin"))
    assert limit // 2 < made["expert_bytes"] + trunk <= limit + 8192  # headers and padding come on top
    assert made["expert_bytes"] < source.manifest.total_bytes
    opened = open_model(str(pack))
    assert isinstance(opened, PackCheckpoint)
    formats = {pair for layer in opened.manifest.layers for pair in layer.formats}
    assert len(formats | {matrix.format for matrix in opened.pack.matrices}) > 1
    assert opened.pack.matrices
    read = load_trunk(opened, 1)  # in those formats
    assert read.vocab_size == load_trunk(source, 1).vocab_size
    assert look("pack", pack).trunk_bytes == of_files(str(pack)).trunk_bytes < trunk
    taken = {fmt for pair in formats for fmt in pair}
    assert set(look("pack", pack).formats) == taken != set(look("source", chat_model).formats)
    assert verify(pack, 1, lambda *_: None).damaged == ()


def contents(pack: Path) -> dict[str, bytes]:
    return {str(file.relative_to(pack)): file.read_bytes() for file in sorted(pack.rglob("*")) if file.is_file()}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """To calibrate with: far less than the text that comes with Moehive."""
    path = tmp_path / "text.txt"
    path.write_text("The harbour lies open to the west, and the fishermen watch the sky. " * 5)
    return path


@dataclass
class Convert:
    """`moehive convert MODEL PACK --budget …` in this process, and how often it calibrated."""

    model: Path
    pack: Path
    text: Path
    calibrations: int = 0
    chosen: BudgetChoice | None = None  # the last time

    def __call__(self, budget: str) -> None:
        packs.convert(str(self.model), self.pack, budget=budget, calibration=self.text, workers=1)


@pytest.fixture
def convert(chat_model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    convert = Convert(chat_model, tmp_path / "pack", text)

    def counted(*arguments: Any) -> BudgetChoice:
        convert.calibrations += 1
        convert.chosen = choose_formats(*arguments)
        return convert.chosen

    monkeypatch.setattr("moehive.coordinator.cli.budget.choose_formats", counted)
    for module in ("candidates", "plan"):
        monkeypatch.setattr(f"moehive.coordinator.precision.{module}.CANDIDATES", FEW)
    return convert


class Killed(Exception):
    """In place of a kill."""


def _killed(*_: Any) -> None:
    raise Killed


def test_a_text_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    class Words:
        async def encode(self, text: str) -> list[int]:
            return [1]

    (tmp_path / "short.txt").write_text("word")
    os.mkfifo(tmp_path / "pipe")
    for file, said in (
        (None, "The text that comes with Moehive has 1 tokens in this model's vocabulary"),
        (tmp_path / "short.txt", "short.txt has 1 tokens"),
        (tmp_path / "pipe", "is a pipe, a device or a socket"),
    ):
        with pytest.raises(CoordinatorError, match=said):
            asyncio.run(calibration_texts(Words(), file))


def test_a_choice_is_made_once(
    convert: Convert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = iter([900_000, 1_000_000, 1_100_000])  # what this machine has room for, from hour to hour
    monkeypatch.setattr("moehive.coordinator.cli.budget.room_for_weights", lambda *_: next(free))
    with monkeypatch.context() as patched:
        patched.setattr("moehive.coordinator.cli.budget.KeptInputs", _killed)  # the choice is made, no expert is
        with pytest.raises(Killed):
            convert("cluster")
    said = capsys.readouterr().out
    assert {path.name for path in convert.pack.iterdir()} == {"choice.msgpack", "calibration"}
    with pytest.raises(CoordinatorError, match="not finished; run the same"):
        open_model(str(convert.pack))
    with monkeypatch.context() as patched:
        patched.setattr("moehive.coordinator.checkpoints.pack.convert.write_trunk", _killed)  # all experts are there
        with pytest.raises(Killed):
            convert("cluster")
    assert (convert.pack / "journal").exists()
    capsys.readouterr()
    convert("cluster")
    again = capsys.readouterr().out
    assert "Formats were chosen before" in again and "whole already" not in again
    kept = kept_choice(convert.pack / "choice.msgpack")
    assert kept is not None and convert.chosen is not None
    best = convert.chosen.precision
    assert (kept.damage, kept.gap) == (best.damage, best.gap) and best.gap == 1 - best.bound / best.damage
    assert f"the best choice would spare {best.gap:.2%} at most" in said
    convert("cluster")
    assert "is whole already" in capsys.readouterr().out
    assert convert.calibrations == 1
    assert {path.name for path in convert.pack.iterdir()} == {
        "choice.msgpack", "experts-00000.bin", "experts-00001.bin", "pack.msgpack", "trunk"
    }  # fmt: skip

    straight = Convert(convert.model, tmp_path / "straight", convert.text)
    straight("900KB")
    for name in ("experts-00000.bin", "experts-00001.bin", "trunk/matrices.bin", "trunk/model.safetensors"):
        assert (convert.pack / name).read_bytes() == (straight.pack / name).read_bytes(), name


def test_a_choice_is_for_one_source_and_its_options(
    convert: Convert, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(chat_model, tmp_path / "other", copy_function=shutil.copyfile))
    text = tmp_path / "more.txt"
    text.write_text(convert.text.read_text() + "The wind turns.")
    other_ways = [
        (Convert(other, convert.pack, convert.text), "900KB"),
        (Convert(chat_model, convert.pack, convert.text), "901KB"),
        (Convert(chat_model, convert.pack, text), "900KB"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("moehive.coordinator.cli.budget.KeptInputs", _killed)
        with pytest.raises(Killed):
            convert("900KB")
    for way, size in other_ways:
        with pytest.raises(CoordinatorError, match="beginning of another pack; delete that directory"):
            way(size)
    with pytest.raises(CoordinatorError, match="beginning of another pack"):
        packs.convert(str(chat_model), convert.pack, format="q8_0")
    convert("900KB")
    for way, size in other_ways:
        with pytest.raises(CoordinatorError, match="pack of another model or format"):
            way(size)
    packs.convert(str(chat_model), tmp_path / "plain", format="q8_0")
    with pytest.raises(CoordinatorError, match="pack of another model or format"):
        Convert(chat_model, tmp_path / "plain", convert.text)("900KB")
    assert convert.calibrations == 1


def test_what_is_kept_of_a_choice_is_checked(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("moehive.coordinator.cli.budget.KeptInputs", _killed)
        with pytest.raises(Killed):
            convert("900KB")
    for name in ("calibration/inputs-00001.bin", "choice.msgpack"):
        path = convert.pack / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
        with pytest.raises(CoordinatorError, match="damaged"):
            convert("900KB")
        path.write_bytes(whole)
    convert("900KB")
    assert convert.calibrations == 1 and verify(convert.pack, 1).damaged == ()


def test_a_run_that_was_killed_while_it_calibrated_begins_anew(
    convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("moehive.coordinator.cli.budget.keep_choice", _killed)
        with pytest.raises(Killed):
            convert("900KB")
    assert [path.name for path in convert.pack.iterdir()] == ["calibration"]
    convert("900KB")
    assert convert.calibrations == 2 and verify(convert.pack, 1).damaged == ()


_KILLED = """
import os, signal, sys
from pathlib import Path
from moehive.coordinator.checkpoints.pack import experts
from moehive.coordinator.checkpoints.pack.journal import Journal
from moehive.coordinator.cli.main import main
from moehive.coordinator.precision import candidates, choice, plan

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def replace(path, target, real=Path.replace):
    return die() if target.name == "choice.msgpack" else real(path, target)

def append(journal, done, real=Journal.append):
    real(journal, done)
    die()

candidates.CANDIDATES = plan.CANDIDATES = tuple(sys.argv.pop(1).split())
experts.COMMIT_SECONDS = 0.0  # as if each expert took long
for place in (choice, "measure", die), (Path, "replace", replace), (Journal, "append", append):
    if os.fork() == 0:
        setattr(*place)
        main()
    print(os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr)
"""


def test_kills_change_nothing(convert: Convert, tmp_path: Path) -> None:
    """While formats are measured, before what was chosen is in its place, after the first entry in the journal."""
    command = [sys.executable, "-c", _KILLED, " ".join(FEW), "convert", str(convert.model), str(convert.pack)]
    command += ["--budget", "900KB", "--calibration", str(convert.text), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert re.findall(r"^-?\d+$", done.stderr, re.M) == ["-9"] * 3, done.stderr
    begun = (convert.pack / "journal").stat().st_size
    convert("900KB")
    straight = Convert(convert.model, tmp_path / "straight", convert.text)
    straight("900KB")
    assert convert.calibrations == 1  # of the straight one
    assert contents(convert.pack) == contents(straight.pack)
    assert begun < 300  # bytes: not yet of all six experts


def test_the_benchmark_kills_while_formats_are_chosen(chat_model: Path, tmp_path: Path) -> None:
    command = ["bench", "convert", "--model", chat_model, "--kills", 2, "--budget", "--state-dir", tmp_path, "--json"]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 2 and all(row["same"] and row["resumed"] == row["journaled"] for row in rows)
    assert any(row["journaled_first"] == 0 for row in rows)


def test_a_cluster_is_a_budget(chat_model: Path, tmp_path: Path) -> None:
    """Its RAM, less what the program and the cache take, and one expert; a GPU's memory is no room."""
    model = of_files(str(chat_model))
    beside = model.kv_bytes_a_token * CONTEXT_TOKENS + COORDINATOR_BYTES + model.layers[0].spec.nbytes
    ram = Tier(123_456 + beside, 1e10)
    machine = Machine("one", coordinator=True, vram=Tier(10**9, 1e12), ram=ram)
    write_cluster(tmp_path / "cluster.toml", Cluster(0.0, 1e9, (machine,)))
    assert budget_bytes(str(chat_model), "cluster", tmp_path / "cluster.toml") == 123_456
    assert budget_bytes(str(chat_model), "120GB", None) == 120 * 10**9
    assert budget_bytes(str(chat_model), "cluster", None) is None  # what is free here when it is chosen


def test_the_benchmark_shows_divergence_and_text(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def short(words: Text, _: None) -> list[torch.Tensor]:
        return [torch.tensor(await words.encode("The harbour lies open to the west. " * 36))]

    monkeypatch.setattr(budget, "calibration_texts", short)
    monkeypatch.setattr(budget, "WHOLE_BITS", 5.0)
    rows = budget.measure_budgets(str(chat_model), tmp_path, 1, lambda *_: None)
    assert [row.bits for row in rows] == [3.5, 4.5, 5.0]  # 128 columns fill half a block, so q2_k takes 3.5
    assert [row.rounded for row in rows] == ["experts", "experts", "all"]
    for row in rows:
        assert row.chosen_bits <= row.bits + 0.01 and (row.uniform_bits <= row.bits or row.rounded == "all")
        assert row.ratio == row.chosen_kl / row.uniform_kl < 1
        assert row.exact_text and row.uniform_text and row.chosen_text


def test_a_budget_that_is_too_small_is_one_sentence(chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CoordinatorError, match=r"^What may be rounded takes at least .* give a larger budget\.$"):
        packs.convert(str(chat_model), tmp_path / "pack", budget="100KB", workers=1)
    assert not (tmp_path / "pack").exists()
