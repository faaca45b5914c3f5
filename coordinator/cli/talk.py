"""`moehive chat` and `moehive status`: clients of a running coordinator."""

import contextlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..sizes import in_bytes
from .loading import load_sentences
from .options import DEFAULT_ADDRESS, Address, ApiKey, CaFile, Json
from .status_words import in_words

if TYPE_CHECKING:
    from moehive.client import Client, Status

HELP = "Type a message and press Enter. /new begins a new chat, /quit (or Ctrl-D) ends; Ctrl-C stops an answer."


def chat(
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Length of an answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.7,
) -> None:
    """Chats with the model of a running coordinator, in the terminal."""
    from moehive.client import Client

    with Client(address, api_key=api_key, ca_file=ca_file) as client:
        status = client.status()
        print(f"{status.model}. {HELP}", file=sys.stderr)
        converse(client, max_tokens, temperature)


def converse(client: "Client", max_tokens: int | None, temperature: float) -> None:
    """A chat in the terminal, until end of input. An answer that is stopped stays in the conversation as it is."""
    import readline  # noqa: F401 - gives input() a history and arrow keys

    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D ends the chat)", file=sys.stderr)
            continue
        if text == "/quit":
            return
        if text == "/new":
            messages = []
        elif text == "/help":
            print(HELP, file=sys.stderr)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _answer(client, messages, max_tokens, temperature)
            messages.append({"role": "assistant", "content": answer})


def _answer(client: "Client", messages: list[dict[str, str]], max_tokens: int | None, temperature: float) -> str:
    parts: list[str] = []
    with contextlib.suppress(KeyboardInterrupt):  # leaving the loop has the coordinator end the generation
        for piece in client.stream(messages=messages, max_tokens=max_tokens, temperature=temperature):
            parts.append(piece.text)
            print(piece.text, end="", flush=True)
    print()
    return "".join(parts)


def status(
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    cluster_file: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write cluster.toml for `moehive estimate`, on the coordinator's machine."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Shows a running coordinator's model, its nodes, what each holds, and the load."""
    from moehive.client import Client

    with Client(address, api_key=api_key, ca_file=ca_file) as client:
        found = client.status()
    if cluster_file is not None:
        _write_cluster_file(found, cluster_file)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        _show(found)


def _write_cluster_file(found: "Status", path: Path) -> None:
    """What the nodes measured, and this machine as the coordinator, measured now."""
    from moehive.kernels.machine import available_memory

    from ..estimate.cluster import write_cluster
    from ..estimate.from_status import of_status
    from ..estimate.this_machine import disk_of, measured
    from ..settings import home

    unmeasured = []
    try:
        disk = disk_of(home())
    except OSError as error:
        disk = None
        unmeasured = [
            f"The disk of {home()} can't be measured ({error.strerror}), so the coordinator has none there."
        ]
    own = replace(measured("coordinator", available_memory() + found.resident_bytes), disk=disk)
    cluster, assumed = of_status(found.nodes, own)
    write_cluster(path, cluster)
    for sentence in [f"{path} is written: {len(cluster.machines)} machines.", *unmeasured, *assumed]:
        print(sentence, file=sys.stderr)


def _show(found: "Status") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from .tables import console

    state = "ready" if found.ready else f"not ready: {found.reason}"
    out = console()
    out.print(Text.assemble((found.model, "bold"), f", {state}"))
    out.print(
        f"{found.running} generations running, {found.waiting} waiting; KV cache {in_bytes(found.kv_bytes_used)} of "
        f"{in_bytes(found.kv_bytes_limit)}; coordinator {in_bytes(found.resident_bytes)}; "
        f"up {found.uptime_seconds:,.0f} s; epoch {found.epoch}; moehive {found.version}"
    )
    # Fits 80 columns; addresses and bandwidths are in --json.
    table = Table("node", "state", "experts", "memory", "expert calls", "computed", "load", box=SIMPLE_HEAD)
    for node in found.nodes:
        if node.state == "away":  # what it holds and does now is not known
            table.add_row(node.name, node.state, f"{node.experts_assigned:,}", "", f"{node.expert_calls:,}", "", "")
            continue
        experts = f"{node.experts_held:,}"
        if node.experts_held != node.experts_assigned:
            experts += f" of {node.experts_assigned:,}"
            experts += f" ({node.load_progress:.0%})" if node.load_total_bytes else ""
        held = node.bytes_held if node.tiers is None else node.tiers.ram_bytes
        memory = f"{in_bytes(held)} of {in_bytes(node.ram_bytes)}"
        computed = f"{node.compute_ns / 1e9:,.1f} s"
        table.add_row(node.name, node.state, experts, memory, f"{node.expert_calls:,}", computed, f"{node.load:.1f}")
    out.print(table)
    for sentence in load_sentences(found.nodes):
        out.print(sentence)
    for sentence in in_words(found.nodes):
        out.print(sentence)
    for node in found.nodes:
        if (tiers := node.tiers) is not None and node.experts_held and node.state != "away":
            out.print(
                f"{node.name}: {in_bytes(tiers.disk_bytes)} of experts on disk, {in_bytes(tiers.ram_bytes)} in "
                f"memory, {in_bytes(tiers.vram_bytes)} on a GPU; {tiers.hit_rate:.0%} of those asked for "
                f"were in memory, {tiers.foreseen_rate:.0%} thanks to a prefetch"
            )
    if found.cache_margin:
        out.print(f"Cache-aware routing is on, margin {found.cache_margin:g}: it changes the model's answers.")
