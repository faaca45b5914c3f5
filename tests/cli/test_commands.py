"""What a newcomer types, right and wrong: help, sentences, exit codes."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from moehive.proto.join_token import parse

# A command → a phrase that its help must have.
HELP = {
    "": "Start here: moehive demo",
    "demo": "It knows what a 135M model knows",
    "up": "until Ctrl-C",
    "chat": "in the terminal",
    "status": "what each holds",
    "init": "certificate authority",
    "coordinator": "Run `moehive init` first",
    "node": "`moehive token` on the coordinator makes one",
    "node drain": "gets none again until it is readmitted",
    "node readmit": "that was drained, or quarantined",
    "node revoke": "lost or stolen",
    "token": "lets one new node into the cluster",
    "key": "clients on other machines",
    "key new": "this once",
    "key list": "Lists the API keys",
    "key revoke": "for good",
}


@pytest.mark.parametrize("command", HELP)
def test_help(moehive: Any, command: str) -> None:
    result = moehive(*command.split(), "--help")
    assert result.code == 0
    assert HELP[command] in " ".join(result.stdout.replace("│", " ").split())
    assert result.sentence == ""


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["up"], "--model"),
        (["up", "--model", "x", "--nodes", "0"], "--nodes"),
        (["up", "--model", "x", "--port", "70000"], "--port"),
        (["demo", "--promt", "x"], "--promt"),
        (["demo", "--prompt", "x", "--max-tokens", "0"], "--max-tokens"),
        (["demo", "--json"], "--json needs --prompt"),
        (["dmeo"], "dmeo"),
        (["token", "--ttl", "soon"], "is not a time; write for example 30m, 1h or 7d"),
        (["coordinator"], "--model"),
        (["coordinator", "--model", "x", "--port", "70000"], "grpc_port must be 0 (any free port) to 65535"),
        (["coordinator", "--model", "x", "--kv-memory", "much"], "'much' is not a size"),
        (["coordinator", "--model", "x", "--config", "/nowhere.toml"], "/nowhere.toml can't be read"),
        (["node", "--threads", "0"], "--threads must be 1"),
        (["trace"], "either --export FILE.npz or --record FILE.npz"),
        (["convert", "x", "y", "--format", "q8_0", "--budget", "1GB"], "give one of them"),
        (["convert", "no/such", "y", "--format", "q9_0"], "Unknown format 'q9_0'; known are keep"),  # at once
        (["convert", "no/such", "y", "--budget", "much"], "'much' is not a size"),
        (["estimate", "qwen3-30b", "--format", "q9_0"], "is not to be had in q9_0; it is in bf16"),
        (["convert", "x", "y", "--calibration", "t"], "it needs --budget"),
        (["convert", "x", "y", "--budget", "1GB", "--cluster", "c"], "it needs '--budget cluster'"),
    ],
)
def test_wrong_usage_is_exit_code_2(moehive: Any, arguments: list[str], wanted: str) -> None:
    result = moehive(*arguments)
    assert result.code == 2
    assert wanted in result.sentence


def test_an_unknown_setting_names_the_known_ones(moehive: Any) -> None:
    result = moehive("coordinator", "--model", "x", MOEHIVE_COORDINATOR_GRCP_PORT="1")
    assert result.code == 2
    assert "'grcp_port'" in result.sentence and "grpc_port" in result.sentence


def test_no_coordinator_at_the_address(moehive: Any) -> None:
    with socket.socket() as bound:  # bound, not listening: nobody answers there
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        for command in ("status", "chat"):
            result = moehive(command, "--address", address)
            assert result.code == 1
            assert f"No coordinator answers at {address}" in result.sentence


def test_a_cluster_from_init_to_token_and_keys(moehive: Any, home: Path) -> None:
    early = moehive("token")
    assert early.code == 1 and "run `moehive init`" in early.sentence
    early = moehive("coordinator", "--model", "x")
    assert early.code == 1 and "moehive init" in early.sentence

    made = moehive("init")
    assert made.code == 0 and str(home) in made.stdout
    again = moehive("init")
    assert again.code == 1 and "already" in again.sentence

    nowhere = moehive("token")
    assert nowhere.code == 1 and "--address HOST:7702" in nowhere.sentence
    assert moehive("token", "--address", "nonsense").code == 2
    word = moehive("token", "--address", "192.168.1.10:7702", "--ttl", "30m", "--json")
    told = json.loads(word.stdout)
    token = parse(told["token"])
    assert (token.address, told["ttl_seconds"]) == ("192.168.1.10:7702", 1800)
    assert token.fingerprint in made.stdout

    key = json.loads(moehive("key", "new", "my laptop", "--json").stdout)
    assert key["key"] not in moehive("key", "list").stdout
    (listed,) = json.loads(moehive("key", "list", "--json").stdout)
    assert (listed["id"], listed["name"], listed["revoked"]) == (key["id"], "my laptop", None)
    assert moehive("key", "revoke", key["id"]).code == 0
    assert "revoked" in moehive("key", "list").stdout
    wrong = moehive("key", "revoke", "00000000")
    assert wrong.code == 1 and "no API key '00000000'" in wrong.sentence


def test_up_with_what_is_no_model(moehive: Any, tiny_dense: Path, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for model, wanted, lines in (
        (nowhere, nowhere, 1),
        (str(tiny_dense), "experts", 2),  # that it starts, and why it does not
    ):
        result = moehive("up", "--model", model, "--nodes", "1", "--port", "0", "--http-port", "0")
        assert result.code == 1, result
        assert wanted in result.sentence
        assert len(result.sentence.strip().splitlines()) == lines


def test_a_budget_without_a_tokenizer(moehive: Any, tiny_moe: Path, tmp_path: Path) -> None:
    result = moehive("convert", str(tiny_moe), str(tmp_path / "pack"), "--budget", "1GB")
    assert result.code == 1 and not (tmp_path / "pack").exists()
    (sentence,) = result.sentence.splitlines()
    assert f"{tiny_moe} has no tokenizer" in sentence and "--format" in sentence


def test_up_on_a_port_in_use(moehive: Any, tiny_moe: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = moehive("up", "--model", str(tiny_moe), "--nodes", "1", "--port", str(port), "--http-port", "0")
    assert result.code == 1
    assert f"127.0.0.1:{port}" in result.sentence and "in use" in result.sentence


def test_an_error_that_nobody_foresaw_is_a_sentence_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moehive.coordinator.cli import main as cli

    def fail() -> None:
        raise ZeroDivisionError("one by none")

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.delenv("MOEHIVE_DEBUG", raising=False)
    assert cli.run() == 1
    assert "MOEHIVE_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("MOEHIVE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.run()
