"""Bytes and counts as a person reads them."""

_ROUNDS_UP = 0.99995  # of a unit: printed with one digit after the point it is 1,000.0 of the smaller one


def in_bytes(count: float) -> str:
    """`count` bytes with a decimal unit: `0 B`, `70.5 kB`, `130.5 GB`, `1,520.0 GB`."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= _ROUNDS_UP * size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:.0f} B"


def in_count(count: float) -> str:
    """A number of weights: `396 billion`, `1.5 billion`, `1.2 million`, `63,904`."""
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if count >= _ROUNDS_UP * size:
            return f"{count / size:,.{0 if count >= 10 * size else 1}f} {word}"
    return f"{count:,.0f}"


def in_digits(value: float) -> str:
    """A measured number with three digits, or all before the point: `0.0512`, `6.46`, `63,600`."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
