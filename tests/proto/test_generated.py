"""The committed protobuf modules: fresh, and runnable with the oldest versions that pyproject.toml allows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTO = ROOT / "proto"


def test_generated_files_are_fresh() -> None:
    pytest.importorskip("grpc_tools", reason="needs the dev extra")
    check = [sys.executable, str(PROTO / "generate.py"), "--check"]
    found = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout + found.stderr


def floor(package: str) -> str:
    """The version behind `package>=` in the base install's dependencies."""
    dependencies: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return next(line.removeprefix(package + ">=") for line in dependencies if line.startswith(package + ">="))


def test_version_floors_are_what_the_generated_files_demand() -> None:
    # Generated code refuses an older runtime when it is imported, so pip must never choose one.
    protobuf = [re.search(r"Protobuf Python Version: (\S+)", f.read_text()) for f in PROTO.glob("*_pb2.py")]
    grpcio = [re.search(r"GRPC_GENERATED_VERSION = '(\S+)'", f.read_text()) for f in PROTO.glob("*_pb2_grpc.py")]
    assert len(protobuf) == len(grpcio) == len(list(PROTO.glob("*.proto")))
    assert {found and found[1] for found in protobuf} == {floor("protobuf")}
    assert {found and found[1] for found in grpcio} == {floor("grpcio")}
