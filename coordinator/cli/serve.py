"""`moehive coordinator` and `moehive node`: one part of a cluster, in the foreground, as systemd runs it."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import (
    CLUSTER_PORT,
    GRPC_PORT,
    HTTP_PORT,
    JOIN_PORT,
    CoordinatorSettings,
    SettingsError,
    load_settings,
)
from .cluster import drain, readmit, revoke
from .options import StateDir
from .process import prepare

if TYPE_CHECKING:
    from ..app import Coordinator

# Done on the coordinator.
NODE_COMMANDS: Mapping[str, Callable[..., None]] = {"drain": drain, "readmit": readmit, "revoke": revoke}
STATUS_SECONDS = 5.0  # between two looks at the cluster for systemd's status line


def coordinator(
    context: typer.Context,
    state_dir: StateDir,
    model: Annotated[
        str | None,
        typer.Option(help="Directory of safetensors, a .gguf file, a pack, or a hub id (org/name, org/name:Q4_K_M)."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings; flags and MOEHIVE_COORDINATOR_… win over it.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Where clients connect.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port for clients.", show_default=str(GRPC_PORT))] = None,
    http_port: Annotated[
        int | None, typer.Option(help="HTTP port (OpenAI's API) for clients.", show_default=str(HTTP_PORT))
    ] = None,
    cluster_host: Annotated[
        str | None,
        typer.Option(help="Where nodes connect; 0.0.0.0 for nodes elsewhere.", show_default="127.0.0.1"),
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(help="This machine's name or address for nodes.", show_default="its own address"),
    ] = None,
    cluster_port: Annotated[
        int | None, typer.Option(help="Port for nodes that are members.", show_default=str(CLUSTER_PORT))
    ] = None,
    join_port: Annotated[
        int | None, typer.Option(help="Port for nodes that join.", show_default=str(JOIN_PORT))
    ] = None,
    min_nodes: Annotated[
        int | None, typer.Option(help="Nodes to wait for before experts are placed.", show_default="1")
    ] = None,
    local_bytes: Annotated[
        str | None,
        typer.Option("--local-memory", help="This machine's own memory for experts, e.g. 8GiB.", show_default="0"),
    ] = None,
    kv_bytes: Annotated[
        str | None,
        typer.Option("--kv-memory", help="Memory for KV caches.", show_default="a quarter of what is free"),
    ] = None,
    cache_margin: Annotated[
        float | None,
        typer.Option(
            "--cache-margin",
            help="Cache-aware routing: an expert in memory may replace one on disk whose score is larger by this "
            "share, for example 0.2. Faster, and answers differ from the model's own. 0: off.",
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option("--deterministic", help="The same text for any placement; more bytes on the wire."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads for this part.", show_default="all cores")] = None,
    trunk_device: Annotated[
        str | None,
        typer.Option(
            help="Where attention, router and shared experts are computed: cpu, cuda, or auto (a GPU that has "
            "room for them).",
            show_default="auto",
        ),
    ] = None,
) -> None:
    """Runs a cluster's coordinator until it is stopped: attention, routing, and the doors for clients.

    Run `moehive init` first. Nodes join with `moehive token`.
    """
    named = context.get_parameter_source("state_dir")
    settings = load_settings(
        {
            "state_dir": state_dir if named is not None and named.name == "COMMANDLINE" else None,
            "model": model,
            "host": host,
            "grpc_port": port,
            "http_port": http_port,
            "cluster_host": cluster_host,
            "cluster_advertise": advertise,
            "cluster_port": cluster_port,
            "join_port": join_port,
            "min_nodes": min_nodes,
            "local_bytes": local_bytes,
            "kv_bytes": kv_bytes,
            "cache_margin": cache_margin,
            "deterministic": deterministic,
            "threads": threads,
            "trunk_device": trunk_device,
        },
        config,
    )
    prepare(verbose=True)
    import uvloop

    uvloop.run(_run(settings))


async def _run(settings: CoordinatorSettings) -> None:
    """Serves until SIGTERM or SIGINT, also when it is still starting."""
    from moehive.proto.ending import end_now, end_soon
    from moehive.proto.malloc import settle_heap
    from moehive.proto.sd_notify import notify

    from ..app import Coordinator

    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    running = Coordinator(settings)
    notify(status="Loading the model.")
    starting = asyncio.create_task(running.start())
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        end_soon()
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        end_now()
    starting.result()
    stopping.add_done_callback(lambda _: end_soon())
    settle_heap()
    feeding = asyncio.create_task(_tell_systemd(running))
    print(
        f"Clients: gRPC {settings.host}:{running.grpc_port}, HTTP {settings.host}:{running.http_port}. "
        f"Nodes: {settings.cluster_advertise}:{running.join_port} (make a token: moehive token).",
        file=sys.stderr,
    )
    try:
        await stopping
    finally:
        notify(stopping=True, status="Stopping.")
        feeding.cancel()
        await running.stop()
    end_now()


async def _tell_systemd(running: "Coordinator") -> None:
    """Ready at once, since clients are answered now; then the watchdog's food, from the loop that serves them."""
    from moehive.proto.sd_notify import notify, watchdog_interval

    pause = min(watchdog_interval() or STATUS_SECONDS, STATUS_SECONDS)
    ready = True
    while True:
        status = running.status()
        words = f"Nodes: {len(status.nodes)}, epoch {status.epoch}." if status.ready else status.reason
        notify(ready=ready, watchdog=True, status=words)
        ready = False
        await asyncio.sleep(pause)


def node(context: typer.Context) -> None:
    """Runs an expert node: gives this machine's memory to a cluster. `moehive node --help` lists its flags.

    On the coordinator's machine, `moehive node drain NAME` moves a node's experts to the others, `moehive node
    readmit NAME` has it take part again, as it does for a node that was quarantined, and `moehive node revoke NAME`
    shuts out one whose machine was lost.
    """
    command = NODE_COMMANDS.get(context.args[0]) if context.args else None
    if command is not None:
        name = context.args[0]
        single = typer.Typer(add_completion=False)
        single.command(name)(command)
        single(args=context.args[1:], prog_name=f"moehive node {name}", standalone_mode=False)
        return
    if context.args and not context.args[0].startswith("-"):
        raise SettingsError(
            f"There is no command `moehive node {context.args[0][:40]}`, but {', '.join(NODE_COMMANDS)}; without one "
            "of them a node is run."
        )
    os.execv(sys.executable, [sys.executable, "-m", "moehive.expert_node", *context.args])
