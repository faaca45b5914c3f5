"""Tables: whole lines wherever no terminal says how wide it is."""

from dataclasses import fields
from typing import Any

import pytest

from moehive.client.results import NodeStatus, Status
from moehive.coordinator.cli.tables import show_figures, show_rows
from moehive.coordinator.cli.talk import _show

LONG = "a-machine-whose-name-is-as-long-as-a-name-may-be-" * 3


def filled(kind: Any, **figures: Any) -> Any:
    """A `kind` whose other numbers are 0 and whose other words are empty."""
    empty = {field.name: "" if field.type is str else 0 for field in fields(kind)}
    return kind(**(empty | figures))


def test_status_in_a_pipe_has_a_line_for_each_node_and_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    experts = {"experts_held": 12_345, "experts_assigned": 98_765, "expert_calls": 123_456_789}
    node = filled(NodeStatus, name=LONG, state="ready", ram_bytes=10**12, tiers=None, **experts)
    reason = "no node holds expert 3 of layer 1; " * 9
    _show(filled(Status, model="[big]", reason=reason, nodes=[node], version="1"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[big], not ready: {reason}"
    row = next(line for line in lines if line.split()[:1] == [LONG])
    assert "12,345 of 98,765" in row and "123,456,789" in row and row.split()[-1] == "0.0"
    assert any(line.startswith(f"{LONG} holds 100% of what is held") and line.endswith(".") for line in lines)


def test_figures_in_a_pipe_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    show_rows([{"name": LONG, **{f"figure_{n}": 10**12 + n for n in range(20)}}], as_json=False)
    show_figures({LONG: LONG}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any(LONG in line and "1,000,000,000,019" in line for line in lines)
    assert any(line.count(LONG) == 2 for line in lines)
