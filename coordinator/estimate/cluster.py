"""The machines that an estimate is for, and the file that describes them.

    [link]
    rtt_s = 0.0003            # a small message there and back
    bandwidth_Bps = 1.25e8    # bytes a second, each way

    [[nodes]]
    name = "desktop"
    coordinator = true        # on one of them
    ram_bytes = 34359738368   # that Moehive may use; likewise vram_bytes and disk_bytes
    ram_Bps = 4.0e10          # bytes of weights a second that all its cores read; likewise vram_Bps and disk_Bps
    products_per_s = 2.4e11   # of weights in q8_0 by all its cores, if known; what AVX2 does by ram_Bps if absent
    token_products_per_s = 1.2e11  # the same in q4_k with one token, weights in caches; as many cores do if absent
    step_factor = 0.6         # of the coordinator, if known: what a step's calls take there; 1 as in constants.py

A tier is there when its bytes and its speed are; what is absent is none.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..regular_file import check_regular
from ..types import CoordinatorError
from ..whole_file import whole_file

MAX_NODES = 256
MAX_BYTES = 1 << 20  # of the file
TIERS = ("vram", "ram", "disk")  # the quickest first
PRODUCTS = ("products_per_s", "token_products_per_s")
_LEAST, _MOST = 1e-6, 1e30  # of what is divided by, so that no time is larger than a float


@dataclass(frozen=True, slots=True)
class Tier:
    """One memory of a machine: bytes, and bytes a second."""

    nbytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine; a tier that it does not have is None, and so are products a second that nobody measured."""

    name: str
    coordinator: bool = False
    vram: Tier | None = None
    ram: Tier | None = None
    disk: Tier | None = None
    step_factor: float = 1.0
    products_per_s: float | None = None
    token_products_per_s: float | None = None

    def tiers(self) -> dict[str, Tier]:
        """Its tiers by name, the quickest first."""
        found = {name: getattr(self, name) for name in TIERS}
        return {name: tier for name, tier in found.items() if tier is not None}


@dataclass(frozen=True, slots=True)
class Cluster:
    """All machines, one of them the coordinator, and the link between any two: seconds, bytes a second."""

    rtt_s: float
    bandwidth: float
    machines: tuple[Machine, ...]

    @property
    def coordinator(self) -> Machine:
        """The machine that runs the trunk."""
        return next(machine for machine in self.machines if machine.coordinator)


def read_cluster(path: Path) -> Cluster:
    """Raises CoordinatorError, one sentence, for a file that is not as described above."""
    try:
        check_regular(path)
        if path.stat().st_size > MAX_BYTES:
            raise CoordinatorError(f"{path} is too large to describe a cluster.")
        return parse_cluster(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise CoordinatorError(f"{path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CoordinatorError(f"{path} is not valid TOML: it is not UTF-8.") from error


def parse_cluster(text: str, source: str = "cluster.toml") -> Cluster:
    """A cluster of a file's text; `source` names it in errors. Raises CoordinatorError."""
    try:
        raw = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise CoordinatorError(f"{source} is not valid TOML: {error}.") from error
    _known(raw, {"link", "nodes"}, source)
    link, nodes = raw.get("link"), raw.get("nodes")
    if not isinstance(link, dict):
        raise CoordinatorError(f"{source} needs a table [link] with rtt_s and bandwidth_Bps.")
    _known(link, {"rtt_s", "bandwidth_Bps"}, f"[link] in {source}")
    if not isinstance(nodes, list) or not 1 <= len(nodes) <= MAX_NODES:
        raise CoordinatorError(f"{source} needs 1 to {MAX_NODES} tables [[nodes]].")
    machines = tuple(_machine(node, source) for node in nodes)
    names = [machine.name for machine in machines]
    if len(set(names)) < len(names):
        raise CoordinatorError(f"{source} names two nodes alike; give each its own name.")
    if sum(machine.coordinator for machine in machines) != 1:
        raise CoordinatorError(f"{source} needs coordinator = true on one node, and on one alone.")
    cluster = Cluster(
        _number(link, "rtt_s", f"[link] in {source}", zero=True), _number(link, "bandwidth_Bps", source), machines
    )
    if cluster.coordinator.ram is None:
        raise CoordinatorError(f"{source} gives the coordinator no ram_bytes and ram_Bps, which the trunk needs.")
    return cluster


def to_toml(cluster: Cluster) -> str:
    """The text that `parse_cluster` makes the same cluster of."""
    lines = ["[link]", f"rtt_s = {cluster.rtt_s!r}", f"bandwidth_Bps = {cluster.bandwidth!r}"]
    for machine in cluster.machines:
        lines += ["", "[[nodes]]", f"name = {_quoted(machine.name)}"]
        if machine.coordinator:
            lines.append("coordinator = true")
        for name, tier in machine.tiers().items():
            lines += [f"{name}_bytes = {tier.nbytes}", f"{name}_Bps = {tier.bytes_per_s!r}"]
        lines += [f"{key} = {value!r}" for key in PRODUCTS if (value := getattr(machine, key)) is not None]
        if machine.step_factor != 1.0:
            lines.append(f"step_factor = {machine.step_factor!r}")
    return "\n".join(lines) + "\n"


def write_cluster(path: Path, cluster: Cluster) -> None:
    """Writes the file beside, then in its place. Raises CoordinatorError."""
    try:
        with whole_file(path) as file:
            file.write(to_toml(cluster).encode())
    except OSError as error:
        raise CoordinatorError(f"{path} can't be written: {error.strerror}.") from error


def _machine(node: Any, source: str) -> Machine:
    if not isinstance(node, dict) or not isinstance(node.get("name"), str) or not 1 <= len(node["name"]) <= 256:
        raise CoordinatorError(f"Each of the [[nodes]] in {source} needs a name.")
    where = f"{node['name']} in {source}"
    of_tiers = {f"{tier}_{kind}" for tier in TIERS for kind in ("bytes", "Bps")}
    _known(node, {"name", "coordinator", "step_factor", *PRODUCTS, *of_tiers}, where)
    coordinator = node.get("coordinator", False)
    if not isinstance(coordinator, bool):
        raise CoordinatorError(f"coordinator of {where} must be true or false.")
    found: dict[str, Any] = {key: _number(node, key, where) for key in ("step_factor", *PRODUCTS) if key in node}
    for tier in TIERS:
        nbytes, speed = f"{tier}_bytes", f"{tier}_Bps"
        if (nbytes in node) != (speed in node):
            raise CoordinatorError(f"{where} needs both {nbytes} and {speed}, or neither.")
        if nbytes in node and (size := int(_number(node, nbytes, where, zero=True))):
            found[tier] = Tier(size, _number(node, speed, where))
    return Machine(node["name"], coordinator, **found)


def _number(values: Mapping[str, Any], name: str, where: str, zero: bool = False) -> float:
    value: Any = values.get(name)
    least = 0 if zero else _LEAST
    if type(value) not in (int, float) or not least <= value < _MOST:
        raise CoordinatorError(f"{name} of {where} must be a number of at least {least:g}, not {value!r}.")
    return float(value)


def _known(values: Mapping[str, Any], names: set[str], where: str) -> None:
    unknown = sorted(set(values) - names)
    if unknown:
        raise CoordinatorError(f"{where} has an unknown key {unknown[0]!r}; known are {', '.join(sorted(names))}.")


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 65536 else c for c in escaped) + '"'
