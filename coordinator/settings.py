"""What a coordinator is started with: file < environment < flags, merged once, checked once.

The file is TOML with the field names below as keys; the environment has MOEHIVE_COORDINATOR_ and the name in
capitals. Sizes are integers (bytes) or text such as "12GiB".
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from fractions import Fraction
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any

from moehive.kernels.machine import available_memory, cores

from .regular_file import check_regular
from .types import CoordinatorError

ENVIRONMENT = "MOEHIVE_COORDINATOR_"
GRPC_PORT, HTTP_PORT, CLUSTER_PORT, JOIN_PORT = 7700, 7780, 7701, 7702

_HOST = re.compile(r"[^\s\[\]/@]{1,253}")  # as a join token's address may have it
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*(?:([KMGT])(i?))?B?", re.IGNORECASE)
_MOST_BYTES = 10**18  # less than 64 bits hold
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class SettingsError(CoordinatorError):
    """A setting is unknown or wrong: a mistake of whoever started the program, exit code 2."""


def home() -> Path:
    """Where everything is kept unless another directory is named: $MOEHIVE_HOME, else the user's data directory."""
    if given := os.environ.get("MOEHIVE_HOME"):
        return Path(given).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "moehive"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """A coordinator's settings. Ports may be 0: any free one."""

    model: str  # directory of safetensors, or a hub id
    state_dir: Path = field(default_factory=home)  # CA, database, certificates
    host: str = "127.0.0.1"  # of both public doors; any address but loopback needs API keys, and TLS is then used
    grpc_port: int = GRPC_PORT
    http_port: int = HTTP_PORT
    cluster_host: str = "127.0.0.1"  # where nodes are let in; 0.0.0.0 for nodes on other machines
    cluster_advertise: str = ""  # name or address by which nodes reach this machine; empty: found out
    cluster_port: int = CLUSTER_PORT  # control and weights, mutual TLS
    join_port: int = JOIN_PORT  # for nodes that have no certificate yet
    min_nodes: int = 1  # the first plan is made when so many nodes are here
    local_bytes: int = 0  # this machine's own memory for experts; 0: all of them are on nodes
    fallback_bytes: int = field(default_factory=lambda: available_memory() // 8)  # for experts whose nodes are away
    kv_bytes: int = field(default_factory=lambda: available_memory() // 4)  # bound of all sequences' caches together
    deterministic: bool = False  # same bits for any placement; costs a row for each expert on the wire, not a token
    # Cache-aware routing: an expert in memory may take the place of one on disk whose score is larger by this share.
    # It changes the model's answers; 0: off.
    cache_margin: float = 0.0
    threads: int = field(default_factory=cores)  # that compute the trunk
    # cpu, cuda, or auto: a GPU if there is one with room for the trunk. `deterministic` keeps to the CPU: the bits
    # of a GPU's sums depend on how many tokens a pass has.
    trunk_device: str = "auto"

    def __post_init__(self) -> None:
        """Raises SettingsError."""
        _check(bool(self.model), "model", "a directory or a hub id")
        for name in ("grpc_port", "http_port", "cluster_port", "join_port"):
            _check(0 <= getattr(self, name) <= 65_535, name, "0 (any free port) to 65535")
        _check(1 <= self.min_nodes <= 1024, "min_nodes", "1 to 1024")
        _check(self.local_bytes >= 0, "local_bytes", "0 or more bytes")
        _check(self.fallback_bytes >= 0, "fallback_bytes", "0 or more bytes")
        _check(self.kv_bytes >= 1 << 20, "kv_bytes", "at least 1MiB")
        _check(0.0 <= self.cache_margin <= 10.0, "cache_margin", "0 (off) to 10")
        _check(1 <= self.threads <= 1024, "threads", "1 to 1024")
        _check(self.trunk_device in ("auto", "cpu", "cuda"), "trunk_device", "auto, cpu or cuda")
        _check(not (self.deterministic and self.trunk_device == "cuda"), "trunk_device", "cpu with deterministic")
        if self.cluster_advertise:
            _check(_is_host(self.cluster_advertise), "cluster_advertise", "this machine's name or address, no port")
        else:
            object.__setattr__(self, "cluster_advertise", _own_name(self.cluster_host))


def load_settings(
    flags: Mapping[str, Any], file: Path | None = None, environment: Mapping[str, str] = os.environ
) -> CoordinatorSettings:
    """Settings from a TOML file, the environment and flags (None: not given), the later ones winning.

    Raises SettingsError for an unknown name, a value of the wrong kind, or a file that can't be read.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        merged |= {name: _value(name, value, str(file)) for name, value in _read(file).items()}
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT):
            name = variable.removeprefix(ENVIRONMENT).lower()
            merged[name] = _value(name, text, f"the environment ({variable})")
    merged |= {name: _value(name, value, "the flags") for name, value in flags.items() if value is not None}
    for known in fields(CoordinatorSettings):
        if known.name not in merged and known.default is MISSING and known.default_factory is MISSING:
            raise SettingsError(
                f"The setting {known.name!r} is missing; give it as --{known.name.replace('_', '-')}."
            )
    return CoordinatorSettings(**merged)


def parse_size(text: str) -> int:
    """Bytes of a size as a person writes it: `12GiB`, `800MB`, `4096`. Raises SettingsError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(f"{text[:40]!r} is not a size; write for example 12GiB, 800MB or a number of bytes.")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    nbytes = Fraction(number) * base ** (" KMGT".index(unit.upper()) if unit else 0)
    if nbytes > _MOST_BYTES:
        raise SettingsError(f"{text[:40]!r} is not a size that a machine may have; the largest is 1000000T.")
    return int(nbytes)


def _read(file: Path) -> dict[str, Any]:
    try:
        check_regular(file)
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"The settings file {file} can't be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {file} is not valid TOML: {error}.") from error


def _value(name: str, value: Any, source: str) -> Any:
    """`value` as the type of the field `name`. Raises SettingsError."""
    kinds = {known.name: known.type for known in fields(CoordinatorSettings)}
    if name not in kinds:
        raise SettingsError(f"{source} has an unknown setting {name!r}; the settings are {', '.join(sorted(kinds))}.")
    kind = kinds[name]
    if kind is bool:
        if isinstance(value, str):
            value = _BOOLEANS.get(value.lower(), value)
        if isinstance(value, bool):
            return value
        raise SettingsError(f"{name} must be true or false, not {value!r} (from {source}).")
    if kind is int:
        if isinstance(value, str) and name.endswith("_bytes"):
            return parse_size(value)
        if isinstance(value, str) and value.isascii() and value.isdigit():
            return int(value)
        if type(value) is int:
            return value
        raise SettingsError(f"{name} must be a whole number, not {value!r} (from {source}).")
    if kind is float:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise SettingsError(f"{name} must be a number, not {value!r} (from {source}).") from None
    if not isinstance(value, str | Path):
        raise SettingsError(f"{name} must be text, not {value!r} (from {source}).")
    return Path(value).expanduser().absolute() if kind is Path else str(value)


def _check(fits: bool, name: str, wanted: str) -> None:
    if not fits:
        raise SettingsError(f"The setting {name} must be {wanted}.")


def _is_host(text: str) -> bool:
    """Whether `text` is a name or an address, IPv6 without brackets, and nothing beside."""
    if ":" in text:
        try:
            IPv6Address(text)
        except ValueError:
            return False
    return bool(_HOST.fullmatch(text))


def _own_name(cluster_host: str) -> str:
    """What nodes call this machine: the address it listens on; of all of them, the one that leads to the network.

    Home networks often resolve no host names, so a name is the last resort.
    """
    import socket

    if cluster_host not in ("0.0.0.0", "::"):
        return cluster_host
    family = socket.AF_INET6 if cluster_host == "::" else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("2001:db8::1" if cluster_host == "::" else "192.0.2.1", 9))  # only routes: sends nothing
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
