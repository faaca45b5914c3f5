"""The table of `moehive bench experts`: grouped by shape and threads, a format's batches one under the other."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table


def experts_table(rows: Sequence[dict[str, Any]]) -> Table:
    """`rows` as `measure_experts` returns them."""
    table = Table("format", "batch", "ms", "GB/s", "read", "share", "torch ms", "kernel")
    for (shape, threads), group in groupby(rows, key=lambda row: (row["shape"], row["threads"])):
        table.add_row(f"[bold]{shape}[/]", *[""] * 6, f"[bold]{_device(threads)}[/]")
        for fmt, batches in groupby(group, key=lambda row: row["format"]):
            for place, row in enumerate(batches):
                table.add_row(
                    fmt if place == 0 else "",
                    str(row["batch"]),
                    f"{row['seconds'] * 1e3:.2f}",
                    f"{row['bandwidth'] / 1e9:.1f}",
                    f"{row['read_bandwidth'] / 1e9:.1f}",
                    f"{row['ratio']:.2f}" if row["batch"] == 1 else "",
                    f"{row['torch_seconds'] * 1e3:.2f}",
                    row["kernel"],
                )
        table.add_section()
    return table


def _device(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}" if threads else "GPU"
