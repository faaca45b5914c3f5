"""Unpacks the archives beside it. Plain module, importable by path."""

import tarfile
from pathlib import Path


def unpack(name: str, folder: Path, *files: str) -> Path:
    """The named files of NAME.tar.xz, or all of them, in `folder`, which is returned."""
    with tarfile.open(Path(__file__).with_name(f"{name}.tar.xz")) as archive:
        wanted = [entry for entry in archive if not files or entry.name in files]
        archive.extractall(folder, wanted, filter="data")
    return folder
