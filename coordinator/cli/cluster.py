"""Commands that work on the state directory, running coordinator or not: `init`, `token`, `key`, `node drain` …"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import SettingsError
from ..types import CoordinatorError, NodeName
from .options import Json, StateDir

if TYPE_CHECKING:
    from ..cluster.store import Store

_DURATION = re.compile(r"(\d+)\s*([smhd])")
ANSWER_SECONDS = 30.0  # a coordinator that runs has answered by then; it looks every second, then plans
LOOK_SECONDS = 0.1
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def init(state_dir: StateDir) -> None:
    """Makes a new cluster: the certificate authority that all its machines will trust.

    Done once, on the machine that will be the coordinator. Keep a copy of the directory: who has it owns the cluster.
    """
    from ..cluster.store import Store
    from ..cluster.trust import Authority

    state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = Authority.create(state_dir / "ca")
    Store(state_dir / "coordinator.sqlite").close()
    typer.echo(f"A new cluster is in {state_dir}; its fingerprint is {authority.fingerprint}.")
    typer.echo("Next: moehive coordinator --model DIR, then moehive token for each node.")


def token(
    state_dir: StateDir,
    ttl: Annotated[str, typer.Option(help="How long it can be used: 30m, 1h, 7d.")] = "1h",
    address: Annotated[
        str | None,
        typer.Option(
            help="host:port of the coordinator's join port, as nodes reach it.",
            show_default="that of the coordinator's latest start",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Prints a join token: one word that lets one new node into the cluster.

    Give it to the node's first start: moehive node --token-file FILE.
    """
    from moehive.proto.bounds import BoundsError, host_port

    from ..cluster.records import load_join_address
    from ..cluster.tokens import create_token
    from ..cluster.trust import Authority

    seconds = _duration(ttl)
    with _store(state_dir) as store:
        where = address or load_join_address(store)
        if where is None:
            raise CoordinatorError(
                "No coordinator of this cluster has run yet, so nodes would not find it; start it first, or give "
                "--address HOST:7702."
            )
        try:
            host_port(where)
        except BoundsError as error:
            raise SettingsError(f"--address: {error}") from error
        made = create_token(store, where, Authority.load(state_dir / "ca").fingerprint, seconds)
    if as_json:
        typer.echo(json.dumps({"token": str(made), "address": where, "ttl_seconds": seconds}))
    else:
        typer.echo(str(made))


def new_key(
    name: Annotated[str, typer.Argument(help="What it is for, in your own words.")],
    state_dir: StateDir,
    as_json: Json = False,
) -> None:
    """Makes an API key and prints it, this once."""
    from ..cluster.keys import create_key

    with _store(state_dir) as store:
        key_id, key = create_key(store, name)
    typer.echo(json.dumps({"id": key_id, "name": name, "key": key}) if as_json else key)


def list_keys(state_dir: StateDir, as_json: Json = False) -> None:
    """Lists the API keys; the keys themselves are not stored."""
    from ..cluster.keys import list_keys as stored_keys

    with _store(state_dir) as store:
        found = stored_keys(store)
    if as_json:
        typer.echo(
            json.dumps([{"id": k.id, "name": k.name, "created": k.created, "revoked": k.revoked} for k in found])
        )
        return
    for key in found:
        state = "revoked" if key.revoked is not None else "good"
        typer.echo(f"{key.id}  {datetime.fromtimestamp(key.created):%Y-%m-%d %H:%M}  {state:7}  {key.name}")


def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `moehive key list` shows it.")],
    state_dir: StateDir,
) -> None:
    """Makes an API key useless, from now on and for good."""
    from ..cluster.keys import revoke_key as revoke

    with _store(state_dir) as store:
        revoke(store, key_id)
    typer.echo(f"The key {key_id} is revoked.")


def drain(
    name: Annotated[str, typer.Argument(help="The node, as `moehive status` names it.")],
    state_dir: StateDir,
) -> None:
    """Moves a node's experts to the others while the cluster serves; it gets none again until it is readmitted.

    The node stays in the cluster and can be switched off once `moehive status` calls it drained.
    """
    from ..cluster.drains import ask_drain, drains

    with _store(state_dir) as store:
        ask_drain(store, name)
        until = monotonic() + ANSWER_SECONDS
        while monotonic() < until:
            asked = drains(store).get(NodeName(name))
            if asked is None or asked.refusal:
                raise CoordinatorError(asked.refusal if asked else f"Node {name} was readmitted meanwhile.")
            if asked.accepted:
                typer.echo(f"The others load what node {name} holds; `moehive status` says when it is drained.")
                return
            sleep(LOOK_SECONDS)
    typer.echo(f"No coordinator has answered yet; node {name} is drained once one serves, if the others have room.")


def readmit(
    name: Annotated[str, typer.Argument(help="The node, as `moehive status` names it.")],
    state_dir: StateDir,
) -> None:
    """Lets a node in again that was drained, or quarantined because it answered what can't be true."""
    from ..cluster.records import readmit_node

    with _store(state_dir) as store:
        readmit_node(store, name)
    typer.echo(f"The node {name} may take part again; one that was shut out tries by itself every half minute.")


def revoke(
    name: Annotated[str, typer.Argument(help="The node, as `moehive status` names it.")],
    state_dir: StateDir,
) -> None:
    """Shuts out a node whose machine was lost or stolen: the coordinator no longer speaks with it.

    Its certificate is not renewed and expires within 30 days; until then other nodes would still take it for one of
    theirs. The others load its experts, if they have the memory. With a new token a node of its name may join again.
    """
    from ..cluster.records import revoke_node

    with _store(state_dir) as store:
        revoke_node(store, name)
    typer.echo(f"The node {name} is shut out until it joins again with a new token.")


@contextmanager
def _store(state_dir: Path) -> "Iterator[Store]":
    from ..cluster.store import Store

    if not (state_dir / "ca").exists():
        raise CoordinatorError(f"There is no cluster in {state_dir}; run `moehive init`, or name its --state-dir.")
    store = Store(state_dir / "coordinator.sqlite")
    try:
        yield store
    finally:
        store.close()


def _duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise SettingsError(f"--ttl {text!r} is not a time; write for example 30m, 1h or 7d.")
    return float(int(match[1]) * _SECONDS[match[2]])
