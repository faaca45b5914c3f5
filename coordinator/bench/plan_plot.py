"""The plot of `moehive bench plan`: how far each way is above the proven bound, as an SVG."""

from collections.abc import Sequence
from typing import Any

WAYS = (
    ("planner", "#1b6ca8"),
    ("EPLB", "#d98c21"),
    ("equal_share", "#7a9e3a"),
    ("round_robin", "#999999"),
    ("random", "#cccccc"),
)
BAR, GAP, LEFT, HEIGHT, MOST = 9, 14, 44, 220, 6.0  # pixels, and the multiple at the top of the axis


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """Bars for each row: time as a multiple of the bound; bars beyond the axis end with their figure."""
    group = BAR * len(WAYS) + GAP
    width = LEFT + group * len(rows) + 10
    base = 40 + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{base + 56}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="14">Time of a layer as a multiple of the proven bound; less is better</text>',
    ]
    for number, (way, color) in enumerate(WAYS):
        at = LEFT + 100 * number
        parts.append(f'<rect x="{at}" y="20" width="9" height="9" fill="{color}"/>')
        parts.append(f'<text x="{at + 13}" y="29">{way.replace("_", " ")}</text>')
    for multiple in range(int(MOST) + 1):
        y = base - HEIGHT * multiple / MOST
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{width - 10}" y2="{y:.1f}" stroke="#e4e4e4"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{multiple}×</text>')
    for index, row in enumerate(rows):
        left = LEFT + group * index + GAP / 2
        for number, (way, color) in enumerate(WAYS):
            value = row[f"{way}_ms"] / row["bound_ms"]
            tall = HEIGHT * min(value, MOST) / MOST
            x = left + BAR * number
            parts.append(
                f'<rect x="{x:.1f}" y="{base - tall:.1f}" width="{BAR - 1}" height="{tall:.1f}" fill="{color}"/>'
            )
            if value > MOST:
                parts.append(f'<text x="{x:.1f}" y="{base - tall - 3:.1f}" font-size="8">{value:.0f}</text>')
        middle = left + group / 2 - GAP / 2
        for line, text in enumerate((f"batch {row['batch']}", f"{row['cluster']}, {row['experts']}")):
            parts.append(f'<text x="{middle:.1f}" y="{base + 16 + 14 * line}" text-anchor="middle">{text}</text>')
    return "\n".join([*parts, "</svg>", ""])
