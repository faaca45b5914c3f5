"""Generates the protobuf modules of this folder; `--check` compares instead and fails when they are stale.

protoc's virtual path mapping makes the generated imports say `moehive.proto`, whatever folder this is.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` under `out`; returns the files."""
    sources = [f"moehive/proto/{p.name}" for p in sorted(PROTO.glob("*.proto"))]
    arguments = ["protoc", f"-Imoehive/proto={PROTO}", f"--python_out={out}", f"--pyi_out={out}"]
    if protoc.main([*arguments, f"--grpc_python_out={out}", *sources]) != 0:  # type: ignore[no-untyped-call]
        raise SystemExit("protoc failed: see its message above.")
    return sorted((out / "moehive" / "proto").iterdir())


def main() -> int:
    """Returns 1 when `--check` finds a stale file, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    stale: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for made in generate(Path(folder)):
            target = PROTO / made.name
            if not target.exists() or target.read_bytes() != made.read_bytes():
                stale.append(made.name)
                if not check:
                    target.write_bytes(made.read_bytes())
    if check and stale:
        print(f"Stale: {', '.join(stale)}. Run `python proto/generate.py`.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
