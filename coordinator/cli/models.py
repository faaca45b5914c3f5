"""`moehive pull` and `moehive models`: models of a hub onto this machine, and what is there."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..sizes import in_bytes
from ..types import CoordinatorError
from .options import DEFAULT_ADDRESS, Address, ApiKey, CaFile, Json

if TYPE_CHECKING:
    from ..checkpoints.inventory import FoundModel

_STAYING = ("joining", "loading", "ready")  # states of nodes that a plan counts on


def pull(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="organization/name, or organization/name:Q4_K_M for one of its GGUFs.")
    ],
    as_json: Json = False,
) -> None:
    """Downloads a model from the hub: only the files that it needs, checked by their hashes.

    Ctrl-C is safe: the next pull goes on in the middle of the file. HF_HOME says where files are kept.
    """
    from ..checkpoints.hub import parse_id
    from .download import download

    wanted = parse_id(model)
    if wanted is None:
        raise CoordinatorError(f"{model!r} is not a hub's id; write organization/name.")
    path = download(wanted, quiet=as_json)
    if as_json:
        print(json.dumps({"model": model, "path": str(path)}))
    else:
        print(f"{model} is in {path}.\nNext: moehive up --model {model}")


def models(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[DIR]...", help="Directories with models, GGUF files or packs.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    api_key: ApiKey = None,
    ca_file: CaFile = None,
    as_json: Json = False,
) -> None:
    """Lists the models on this machine: size, format, and whether the running cluster has room for them.

    Looks into the hub's cache and into each DIR. Without a cluster, this machine's free memory counts.
    """
    from ..checkpoints.inventory import inventory

    for folder in folders or ():
        if not folder.exists():
            raise CoordinatorError(f"There is no directory {folder}.")
    room = _room(address, api_key, ca_file)
    found = list(inventory(folders or []))
    if as_json:
        rows = [asdict(each) | {"path": str(each.path), "fits": _fits(each, room)} for each in found]
        print(json.dumps(asdict(room) | {"models": rows}))
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    from .tables import console

    # A name is folded, never cut: it is what `--model` takes.
    table = Table(Column("model", overflow="fold"), "kind", "size", "experts", "format", "fits", box=SIMPLE_HEAD)
    for each in found:
        sizes = in_bytes(each.file_bytes), in_bytes(each.expert_bytes)
        table.add_row(each.name, each.kind, *sizes, ", ".join(each.formats), _in_words(each, room))
    out = console()
    out.print(table if found else "No models yet; get one with: moehive pull ORGANIZATION/NAME")
    where = f"{room.nodes} nodes of the cluster" if room.nodes else "this machine, without a cluster"
    disk = f", {in_bytes(room.disk_bytes)} of disk" if room.disk_bytes else ""
    out.print(f"Room for experts: {in_bytes(room.memory_bytes)} of memory{disk} ({where}).")


@dataclass(frozen=True, slots=True)
class _Room:
    """Bytes for experts, and the nodes that give them; 0 nodes: what is free on this machine, for the trunk too."""

    memory_bytes: int
    disk_bytes: int  # that are used when memory is not enough
    nodes: int
    trunk_bytes: int | None = None  # for the trunk, where the coordinator runs; not known of another machine


def _room(address: str, api_key: str | None, ca_file: Path | None) -> _Room:
    """What a running coordinator's nodes give to a plan, else this machine. A GPU's memory is no room."""
    from moehive.client import Client, MoehiveError
    from moehive.kernels.machine import available_memory

    from ..serving.doors import is_loopback

    try:
        with Client(address, api_key=api_key, ca_file=ca_file) as client:
            status = client.status()
    except MoehiveError:
        return _Room(available_memory(), 0, 0)
    staying = [node for node in status.nodes if node.state in _STAYING and node.ram_bytes]
    # The trunk that is served now makes way for another.
    trunk = (
        available_memory() + status.resident_bytes if is_loopback(address.rpartition(":")[0].strip("[]")) else None
    )
    return _Room(sum(n.ram_bytes for n in staying), sum(n.disk_bytes for n in staying), len(staying), trunk)


def _need(model: "FoundModel", room: _Room) -> int:
    """Bytes that must fit: nodes hold experts; a machine alone also the trunk."""
    return model.expert_bytes if room.nodes else model.expert_bytes + model.trunk_bytes


def _trunk_lacks(model: "FoundModel", room: _Room) -> int:
    """Bytes that the coordinator lacks for the trunk, as far as is known."""
    return 0 if room.trunk_bytes is None else max(0, model.trunk_bytes - room.trunk_bytes)


def _fits(model: "FoundModel", room: _Room) -> bool:
    if model.problem is not None or _trunk_lacks(model, room):
        return False
    return _need(model, room) <= room.memory_bytes + room.disk_bytes


def _in_words(model: "FoundModel", room: _Room) -> str:
    if model.problem is not None:
        return model.problem
    if lacks := _trunk_lacks(model, room):
        return f"no, the coordinator needs {in_bytes(lacks)} more memory for the trunk"
    beyond = _need(model, room) - room.memory_bytes
    if beyond <= 0:
        return "yes"
    if _fits(model, room):
        return f"yes, {in_bytes(beyond)} of it on disks"
    return f"no, {in_bytes(beyond - room.disk_bytes)} more memory is needed"
