"""What a node is started with, checked once; sizes in bytes."""

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from moehive.proto.bounds import MAX_BYTES, MAX_THREADS, BoundsError, host_port, node_name
from moehive.proto.join_token import JoinToken, TokenError, parse

from .types import ConfigError

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*(B|[KMGT]i?B?)?", re.IGNORECASE)
_UNITS = {
    "": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30, "TI": 1 << 40,
}  # fmt: skip
MIN_MEMORY = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A node's settings. None: the node finds out by itself."""

    state: Path
    token: JoinToken | None = None
    name: str | None = None  # of the node in the cluster; else the certificate's, else the host's
    listen: tuple[str, int] | None = None  # else the address that reaches the coordinator, any free port
    advertise: str | None = None  # host:port; else where it listens
    memory_bytes: int | None = None  # for experts; else what is free, less head-room
    vram_bytes: int | None = None  # of a GPU, for the experts that are used most; else most of what is free
    disk_bytes: int | None = None  # for experts that memory does not hold; else most of what is free
    threads: int  # that compute experts

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"--threads must be 1 to {MAX_THREADS}, not {self.threads}.")
        if self.memory_bytes is not None and self.memory_bytes < MIN_MEMORY:
            raise ConfigError("--memory must be at least 1MiB.")
        try:
            if self.name is not None:
                node_name(self.name)
            if self.advertise is not None:
                host_port(self.advertise)
        except BoundsError as error:
            raise ConfigError(str(error)) from error


def parse_size(text: str) -> int:
    """Bytes of a size as a person writes it: `12GiB`, `800M`, `1.5 TB`. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text[:40]!r} is not a size: write for example 12GiB or 800MB.")
    unit = (match[2] or "").upper()
    nbytes = int(float(match[1]) * _UNITS[unit.removesuffix("B")])
    if nbytes > MAX_BYTES:
        raise ConfigError(f"{text[:40]!r} is not a size that a machine may have.")
    return nbytes


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port to listen on; port 0 is any free one. Raises ConfigError."""
    try:
        if text.endswith(":0"):
            return host_port(f"{text[:-1]}1")[0], 0
        return host_port(text)
    except BoundsError as error:
        raise ConfigError(str(error)) from error


def read_token(word: str | None, file: Path | None) -> JoinToken | None:
    """The join token of --token, else of --token-file, else of systemd's credential `token`. Raises ConfigError."""
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if word is None and file is None and credentials:
        file = Path(credentials) / "token"
        if not file.exists():
            file = None
    if word is None and file is not None:
        try:
            word = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(f"The token file {file} cannot be read: {reason}.") from error
    if word is None or not word.strip():
        return None
    try:
        return parse(word)
    except TokenError as error:
        raise ConfigError(str(error)) from error


def default_state() -> Path:
    """systemd's StateDirectory, else a folder in the user's home."""
    given = os.environ.get("STATE_DIRECTORY")
    if given:
        return Path(given.split(":")[0])
    return Path.home() / ".local" / "state" / "moehive" / "node"


def default_name() -> str:
    """The host's name as a node's name."""
    short = socket.gethostname().split(".")[0].lower()
    name = re.sub(r"[^a-z0-9]+", "-", short).strip("-")[:63].strip("-")
    return name or "node"
