"""`moehive convert` and `moehive verify`: a model into a pack, and a pack against its hashes."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import SettingsError, parse_size
from ..sizes import in_bytes
from ..types import CoordinatorError
from .options import Json
from .process import prepare
from .progress import byte_bar

if TYPE_CHECKING:
    from ..checkpoints.pack.convert import Choose, Converted
    from ..checkpoints.pack.verify import Verified
    from ..precision.kept_choice import KeptChoice

Pack = Annotated[Path, typer.Argument(metavar="PACK", help="The pack's directory.")]


def convert(
    source: Annotated[
        str, typer.Argument(help="Directory of safetensors, a .gguf file, another pack, or a hub id (org/name).")
    ],
    pack: Pack,
    format: Annotated[
        str | None,
        typer.Option(
            help="Of the experts, as q8_0 or int4_g32; 'keep' copies them as they are.",
            show_default="served in place, without a copy, where kernels compute in the source's own format",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Bytes for the whole model, as 120GB, or 'cluster': each part gets the format that harms least.",
            show_default="none",
        ),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="cluster.toml, for '--budget cluster'; `moehive status --cluster-file FILE` writes one.",
            show_default="this machine",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Text in UTF-8 that the model is used for, for --budget.",
            show_default="a mixed text that comes with Moehive",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=256, help="Experts in work at once.", show_default="a core each")
    ] = None,
    as_json: Json = False,
) -> None:
    """Makes a pack of a model: a hash for each expert, and its experts laid out as nodes compute them.

    It may be stopped at any time; the same command goes on where it was.
    """
    if budget is not None and format is not None:
        raise SettingsError("--format gives all experts one format and --budget chooses; give one of them.")
    if calibration is not None and budget is None:
        raise SettingsError("--calibration is the text that formats are chosen with: it needs --budget.")
    if cluster is not None and budget != "cluster":
        raise SettingsError("--cluster is read for what its machines have room for: it needs '--budget cluster'.")
    if budget is not None and budget != "cluster":
        parse_size(budget)
    prepare(verbose=False, hop=False)
    import torch

    from moehive.kernels.machine import cores

    from ..checkpoints.hub import hub_id
    from ..checkpoints.opening import open_model
    from ..checkpoints.pack.convert import KEEP
    from ..checkpoints.pack.convert import convert as run
    from ..checkpoints.pack.encoding import check_format
    from ..checkpoints.pack.unfinished import CHOICE
    from ..precision.kept_choice import kept_choice
    from .download import download

    torch.set_num_threads(1)  # each worker is one thread
    if format is not None and format != KEEP:
        check_format(format)  # before a model is downloaded in vain
    wanted_id = hub_id(source)
    if wanted_id is not None:
        download(wanted_id, quiet=as_json)
    opened = open_model(source)
    hashing = format is None and budget is None and opened.computed_as_stored
    threads = workers or cores()
    wanted: str | Choose | None = format
    if budget is not None:
        from .budget import BudgetChooser, budget_bytes

        wanted = BudgetChooser(
            source, opened, budget_bytes(source, budget, cluster), calibration, threads, quiet=as_json
        )
    with byte_bar("Hashing" if hashing else "Converting", quiet=as_json) as progress:
        made = run(opened, pack, wanted, threads, progress)
    if as_json:
        kept = None if budget is None else kept_choice(pack / CHOICE)
        typer.echo(json.dumps(_converted_row(pack, made, kept)))
    else:
        _show_converted(source, pack, made)


def _converted_row(pack: Path, made: "Converted", kept: "KeptChoice | None") -> dict[str, Any]:
    row: dict[str, Any] = {
        "pack": str(pack),
        "in_place": made.in_place,
        "experts": made.experts,
        "resumed": made.resumed,
        "expert_bytes": made.expert_bytes,
        "trunk_bytes": made.trunk_bytes,
        "seconds": made.seconds,
    }
    if kept is not None:
        row |= {"budget_bytes": kept.budget, "expected_nats_a_token": kept.damage, "gap": kept.gap}
    return row


def _show_converted(source: str, pack: Path, made: "Converted") -> None:
    size = f"{made.experts:,} experts of {made.manifest.name}, {in_bytes(made.expert_bytes)}"
    if made.seconds == 0:
        typer.echo(f"{pack} is whole already: {size}.")
    elif made.in_place:
        typer.echo(
            f"{size}, are in a format that nodes compute in, so nothing was copied: {pack} holds their hashes and "
            f"serves {source} in place. --format keep makes a copy that needs the source no more."
        )
    else:
        rate = made.expert_bytes * (1 - made.resumed / made.experts) / max(made.seconds, 1e-9)
        typer.echo(
            f"{size}, and a trunk of {in_bytes(made.trunk_bytes)} are in {pack}: {made.seconds:,.1f} s, "
            f"{in_bytes(rate)}/s" + (f", {made.resumed:,} experts were there already." if made.resumed else ".")
        )
    typer.echo(f"Run it: moehive up --model {pack}")


def verify(pack: Pack, as_json: Json = False) -> None:
    """Reads a whole pack and compares experts and trunk with their hashes; says what is damaged (exit code 1)."""
    from moehive.kernels.machine import cores

    from ..checkpoints.pack.verify import verify as run

    with byte_bar("Verifying", quiet=as_json) as progress:
        found = run(pack, cores(), progress)
    if as_json:
        typer.echo(json.dumps(_verified_row(found)))
    if found.damaged or found.damaged_files:
        raise CoordinatorError(_damage(pack, found))
    if not as_json:
        typer.echo(f"{pack} is whole: {found.experts:,} experts, {in_bytes(found.nbytes)}.")
        if not found.trunk_hashed:
            typer.echo(
                "Its trunk was not read: an earlier version made the pack, without hashes of the trunk. The same "
                "`moehive convert` again adds them."
            )


def _verified_row(found: "Verified") -> dict[str, Any]:
    return {
        "experts": found.experts,
        "bytes": found.nbytes,
        "damaged": [{"layer": expert.layer, "expert": expert.expert} for expert in found.damaged],
        "damaged_files": list(found.damaged_files),
        "trunk_hashed": found.trunk_hashed,
    }


def _damage(pack: Path, found: "Verified") -> str:
    """What of a pack is not as its hashes say, and what to do, in one sentence."""
    parts = [f"expert {expert.expert} of MoE layer {expert.layer}" for expert in found.damaged[:20]]
    parts += [f"the trunk's {name}" for name in found.damaged_files]
    more = f" and {len(found.damaged) - 20} more experts" if len(found.damaged) > 20 else ""
    where, then = (
        (f"{found.source}, which {pack} serves in place,", "get it again, and convert it into a new pack")
        if found.source
        else (str(pack), "copy or convert the model again")
    )
    return f"{where} is damaged: {', '.join(parts)}{more}; {then}."
