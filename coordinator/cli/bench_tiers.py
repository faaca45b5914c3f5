"""`moehive bench tiers`."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from .options import Json
from .tables import console


def tiers(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layers, tokens and rounds.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            help="One more model whose answers cache-aware routing changes.",
            show_default="the demo's, once it is built",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Experts twice as large as the memory for them: speed beside the disk's limit, with and without prefetch."""
    from dataclasses import asdict

    from ..bench.tiers import measure_tiers
    from ..settings import home

    built = home() / "demo" / "smollm2-135m-moe"
    report = measure_tiers(quick, model or (built if built.exists() else None))
    if as_json:
        typer.echo(json.dumps(asdict(report)))
        return
    from rich.table import Table

    out = console()
    models = list(next(iter(report.divergence.values())))
    table = Table(
        "way",
        "tokens/s",
        *(f"KL, {model}" for model in models),
        "of limit",
        "hit rate",
        "foreseen",
        "late",
        "unused",
        "disk GB/s",
        "busy",
    )
    for row in report.rows:
        table.add_row(
            row.way,
            f"{row.decode_tokens_per_s:.1f}",
            *(
                f"{report.divergence[row.way][name].kl:.4f}" if row.way in report.divergence else ""
                for name in models
            ),
            f"{row.limit_share:.2f}",
            *(f"{share:.0%}" for share in (row.hit_rate, row.foreseen_rate, row.late_rate, row.unused_share)),
            f"{row.disk_Bps / 1e9:.2f}",
            f"{row.disk_busy:.0%}",
        )
    out.print(table)
    last = report.rows[-1]
    out.print(
        f"Prefetch gains {report.prefetch_gain:.2f} times; {1 / report.rows[0].limit_share:.2f} would keep the disk "
        "reading all the time, and nothing in vain. With all experts in memory it would be "
        f"{500 / last.experts_alone_ms:.1f} tokens/s.",
        highlight=False,
    )
    out.print(
        f"A router names {_shares(report.recall)} of a layer's experts from one and two layers before; "
        f"{report.reuse:.0%} of them were asked for by the token before.",
        highlight=False,
    )
    named, came = zip(*report.transitions, strict=True)
    out.print(
        f"What followed before names {_shares(named)} of them one and two layers before; of what it names, "
        f"{_shares(came)} are asked for.",
        highlight=False,
    )
    out.print("KL: nats a token, with half of the experts in memory.", highlight=False)
    out.print("Disk: " + ", ".join(f"{way} {rate / 1e9:.2f} GB/s" for way, rate in report.disk.items()))
    out.print("Hit rates: " + ", ".join(f"{name} {rate:.1%}" for name, rate in report.policies.items()))
    most = max(row.most_ram_bytes for row in report.rows)
    out.print(f"Experts took at most {most / 1e6:,.0f} of {last.ram_bytes / 1e6:,.0f} MB.", highlight=False)
    if last.group_limit_bytes:
        out.print(
            f"Its control group held at most {last.group_peak_bytes / 1e6:,.0f} MB, limit "
            f"{last.group_limit_bytes / 1e6:,.0f}; {last.killed} times a process was ended for it.",
            highlight=False,
        )
    else:
        held = max(row.process_bytes for row in report.rows)
        out.print(
            f"No control group could be made here: the process had no limit, and held {held / 1e6:,.0f} of "
            f"{last.process_limit_bytes / 1e6:,.0f} MB.",
            highlight=False,
        )


def _shares(shares: Iterable[float]) -> str:
    return " and ".join(f"{share:.0%}" for share in shares)
