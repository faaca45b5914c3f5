"""How quickly a machine reads weights and multiplies one token with them, bytes a second within a step.

A processor does both at once. Whichever takes longer is nearly all of the time; where both take alike long, each
holds the other up for a while: it is the cube root of the sum of their cubes. What was measured as reading is of
q8_0, whose products are in it, so they are taken off first. With many cores memory is the bound, with one or two it
may be arithmetic.
"""

from moehive.kernels.geometry import BLOCKS, PLAIN_BYTES

from .cluster import Machine
from .constants import (
    JOIN,
    LATENT_PRODUCTS,
    OTHER_TOKEN_PRODUCTS,
    STEP_SHARE,
    TOKEN_PRODUCTS,
    TOKEN_PRODUCTS_PER_BYTE,
)
from .model import LATENT, Model


def tier_speeds(model: Model, machine: Machine) -> dict[str, float]:
    """Of experts in each of a machine's tiers. Arithmetic is no bound on a GPU, and none beside a disk."""
    speeds = {name: tier.bytes_per_s for name, tier in machine.tiers().items()}
    if "vram" in speeds:
        speeds["vram"] *= STEP_SHARE
    if "ram" in speeds:
        speeds["ram"] = _in_its_formats(model, machine)
    return speeds


def part_speed(model: Model, machine: Machine, part: str) -> float:
    """Of a part of the trunk (model.PARTS), which lies in RAM."""
    if part == LATENT:
        return _joined(machine, 2.0, LATENT_PRODUCTS)
    format = model.trunk_format(part)
    return _in_its_formats(model, machine) if format == model.format else _of_format(machine, format)


def _in_its_formats(model: Model, machine: Machine) -> float:
    weights = sum(layer.experts * layer.spec.weights for layer in model.layers)
    other = _joined(machine, model.expert_bytes / weights, OTHER_TOKEN_PRODUCTS)
    return model.by_format({format: _of_format(machine, format) for format in TOKEN_PRODUCTS}, other)


def _of_format(machine: Machine, format: str) -> float:
    return _joined(machine, _weight_bytes(format), TOKEN_PRODUCTS[format])


def _joined(machine: Machine, weight_bytes: float, share: float) -> float:
    """Of weights of so many bytes each, whose products are done at so much of q4_k's speed."""
    assert machine.ram is not None
    read = machine.ram.bytes_per_s
    products = machine.token_products_per_s or TOKEN_PRODUCTS_PER_BYTE * read
    of_q8_0 = (_weight_bytes("q8_0") * TOKEN_PRODUCTS["q8_0"] * products) ** -JOIN
    reading = max(read**-JOIN - of_q8_0, (2 * read) ** -JOIN)  # figures that can't be of one machine stay figures
    multiplying = (weight_bytes * share * products) ** -JOIN
    return float(STEP_SHARE * (reading + multiplying) ** (-1 / JOIN))


def _weight_bytes(format: str) -> float:
    if format in PLAIN_BYTES:
        return PLAIN_BYTES[format]
    columns, nbytes = BLOCKS[format]
    return nbytes / columns
