"""`moehive pull` and `moehive models`: models of a hub onto this machine, and what is there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..types import CoordinatorError
from .options import DEFAULT_ADDRESS, Address, ApiKey, CaFile, Json

if TYPE_CHECKING:
    from ..checkpoints.inventory import FoundModel


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
    """Lists the models on this machine: size, format, and whether the running cluster has the memory for them.

    Looks into the hub's cache and into each DIR. Without a cluster, this machine's free memory counts.
    """
    from ..checkpoints.inventory import inventory

    for folder in folders or ():
        if not folder.exists():
            raise CoordinatorError(f"There is no directory {folder}.")
    memory, nodes = _memory(address, api_key, ca_file)
    found = list(inventory(folders or []))
    fits = [_fits(each, memory, nodes) for each in found]
    if as_json:
        rows = [asdict(each) | {"path": str(each.path), "fits": fit} for each, fit in zip(found, fits, strict=True)]
        print(json.dumps({"memory_bytes": memory, "nodes": nodes, "models": rows}))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    where = f"{nodes} nodes of the cluster" if nodes else "this machine, without a cluster"
    table = Table("model", "kind", "size", "experts", "format", "fits", box=SIMPLE_HEAD)
    for each, fit in zip(found, fits, strict=True):
        said = each.problem or ("yes" if fit else f"no, {_size(_need(each, nodes) - memory)} more memory is needed")
        table.add_row(
            each.name, each.kind, _size(each.file_bytes), _size(each.expert_bytes), ", ".join(each.formats), said
        )
    console = Console()
    console.print(table if found else "No models yet; get one with: moehive pull ORGANIZATION/NAME")
    console.print(f"Memory for experts: {_size(memory)} ({where}).", highlight=False)


def _memory(address: str, api_key: str | None, ca_file: Path | None) -> tuple[int, int]:
    """Bytes for experts, and the nodes that give them; without a running cluster, what is free here and 0."""
    from moehive.client import Client, MoehiveError
    from moehive.kernels.machine import available_memory

    try:
        with Client(address, api_key=api_key, ca_file=ca_file) as client:
            nodes = client.status().nodes
    except MoehiveError:
        return available_memory(), 0
    return sum(node.ram_bytes for node in nodes), len(nodes)


def _need(model: "FoundModel", nodes: int) -> int:
    """Bytes that must fit: nodes hold experts; a machine alone also the trunk."""
    return model.expert_bytes if nodes else model.expert_bytes + model.trunk_bytes


def _fits(model: "FoundModel", memory: int, nodes: int) -> bool:
    return model.problem is None and _need(model, nodes) <= memory


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
