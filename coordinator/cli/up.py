"""`moehive up`: a whole cluster on this machine, in the foreground."""

import contextlib
import json
import os
import signal
import sys
from typing import Annotated

import typer

from ..settings import GRPC_PORT, HTTP_PORT
from .options import Json, Nodes, StateDir
from .process import prepare


def up(
    model: Annotated[
        str,
        typer.Option(help="Directory of safetensors, a .gguf file, a pack, or a hub id (org/name, org/name:Q4_K_M)."),
    ],
    state_dir: StateDir,
    nodes: Nodes = 3,
    port: Annotated[int, typer.Option(min=0, max=65_535, help="gRPC port; 0 picks a free one.")] = GRPC_PORT,
    http_port: Annotated[
        int, typer.Option(min=0, max=65_535, help="HTTP port (OpenAI's API); 0 picks a free one.")
    ] = HTTP_PORT,
    as_json: Json = False,
) -> None:
    """Runs a mixture-of-experts model on this machine: a coordinator and some expert nodes, until Ctrl-C.

    With --json, one line says when it is ready: {"grpc_port": …, "http_port": …, "pid": …}.
    """
    prepare(verbose=False)
    from moehive.proto.ending import end_now

    from ..checkpoints.hub import hub_id
    from ..local_cluster import folder_name
    from .background import running_cluster
    from .download import download

    wanted = hub_id(model)
    if wanted is not None:
        download(wanted, quiet=as_json)  # now, while no node waits for it
    print(f"Starting {_nodes(nodes)} for {model} …", file=sys.stderr)
    base = state_dir / "up" / folder_name(model, nodes)
    with running_cluster(model, base, nodes, port, http_port) as cluster:
        grpc, http = cluster.coordinator.grpc_port, cluster.coordinator.http_port
        ready = {"model": model, "grpc_port": grpc, "http_port": http, "pid": os.getpid(), "state_dir": str(base)}
        if as_json:
            print(json.dumps(ready), flush=True)
        else:
            print(_greeting(cluster.coordinator.model_name, nodes, grpc, http), flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # SIGTERM and Ctrl-C
            while True:
                signal.pause()
    end_now()


def _nodes(count: int) -> str:
    return "1 expert node" if count == 1 else f"{count} expert nodes"


def _greeting(model: str, nodes: int, grpc_port: int, http_port: int) -> str:
    url = f"http://127.0.0.1:{http_port}/v1/chat/completions"
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return (
        f"{model} is up on {_nodes(nodes)}. Ctrl-C ends it.\n"
        f"  chat     moehive chat --address 127.0.0.1:{grpc_port}\n"
        f"  Python   from moehive.client import Client; "
        f"Client('127.0.0.1:{grpc_port}').generate(prompt='The sky is', max_tokens=24)\n"
        f"  OpenAI   curl {url} -H 'content-type: application/json' -d '{body}'"
    )
