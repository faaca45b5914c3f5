"""`moehive bench tiers`."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Json
from .tables import console

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.tiers import TiersReport


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
    out = console()
    out.print(_table(report))
    for sentence in (*_what_helps(report), *_memory(report)):
        out.print(sentence, highlight=False)


def _table(report: "TiersReport") -> "Table":
    from rich.table import Table

    models = list(next(iter(report.divergence.values())))
    measured = ("of limit", "hit rate", "foreseen", "late", "unused", "disk GB/s", "busy")
    table = Table("way", "tokens/s", *(f"KL, {model}" for model in models), *measured)
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
    return table


def _what_helps(report: "TiersReport") -> Iterator[str]:
    """Sentences: what prefetch and routing ahead bring."""
    first, last = report.rows[0], report.rows[-1]
    yield (
        f"Prefetch gains {report.prefetch_gain:.2f} times; {1 / first.limit_share:.2f} would keep the disk "
        "reading all the time, and nothing in vain. With all experts in memory it would be "
        f"{500 / last.experts_alone_ms:.1f} tokens/s."
    )
    yield (
        f"A router names {_shares(report.recall)} of a layer's experts from one and two layers before; "
        f"{report.reuse:.0%} of them were asked for by the token before."
    )
    named, came = zip(*report.transitions, strict=True)
    yield (
        f"What followed before names {_shares(named)} of them one and two layers before; of what it names, "
        f"{_shares(came)} are asked for."
    )
    yield "KL: nats a token, with half of the experts in memory."
    yield "Disk: " + ", ".join(f"{way} {rate / 1e9:.2f} GB/s" for way, rate in report.disk.items())
    yield "Hit rates: " + ", ".join(f"{name} {rate:.1%}" for name, rate in report.policies.items())


def _memory(report: "TiersReport") -> Iterator[str]:
    """Sentences: what the experts and the process took, and what bounded them."""
    last = report.rows[-1]
    most = max(row.most_ram_bytes for row in report.rows)
    yield f"Experts took at most {most / 1e6:,.0f} of {last.ram_bytes / 1e6:,.0f} MB."
    if last.group_limit_bytes:
        yield (
            f"Its control group held at most {last.group_peak_bytes / 1e6:,.0f} MB, limit "
            f"{last.group_limit_bytes / 1e6:,.0f}; {last.killed} times a process was ended for it."
        )
    else:
        held = max(row.process_bytes for row in report.rows)
        yield (
            f"No control group could be made here: the process had no limit, and held {held / 1e6:,.0f} of "
            f"{last.process_limit_bytes / 1e6:,.0f} MB."
        )


def _shares(shares: Iterable[float]) -> str:
    return " and ".join(f"{share:.0%}" for share in shares)
