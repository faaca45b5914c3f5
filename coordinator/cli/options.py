"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from ..settings import GRPC_PORT, home

StateDir: TypeAlias = Annotated[
    Path,
    typer.Option(
        help="Where this cluster's keys, database and caches are kept.",
        default_factory=home,
        show_default="$MOEHIVE_HOME, else ~/.local/share/moehive",
        file_okay=False,
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Nodes: TypeAlias = Annotated[int, typer.Option(min=1, max=64, help="Expert node processes to start.")]
Address: TypeAlias = Annotated[str, typer.Option(help="host:port of the coordinator's gRPC door.")]
ApiKey: TypeAlias = Annotated[
    str | None, typer.Option(envvar="MOEHIVE_API_KEY", help="API key; needed for a coordinator on another machine.")
]
CaFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(help="The cluster's CA certificate (ca/ca.crt), for a coordinator on another machine.", exists=True),
]
DEFAULT_ADDRESS = f"127.0.0.1:{GRPC_PORT}"
