"""Checks what sdist and wheel hold: `check_dist.py DIST TRACKED`, their folder and a file with git's file list."""

import sys
import tarfile
import zipfile
from pathlib import Path

SOURCES = (".cc", ".h", ".proto", "CMakeLists.txt", "/generate.py")
PARTS = ("client", "coordinator", "expert_node", "kernels", "proto")


def check_wheel(names: list[str]) -> list[str]:
    """What is wrong with a wheel of these files."""
    wrong = [f"the wheel holds the source {name}" for name in names if name.endswith(SOURCES)]
    wrong += [f"the wheel holds {name}" for name in names if not name.startswith(("moehive/", "moehive-"))]
    wrong += [f"the wheel holds {name} twice" for name in names if name.startswith("moehive/proto/client/")]
    needed = [f"moehive/{part}/py.typed" for part in PARTS]
    needed += ["moehive/kernels/libmoehive_kernels.so", "moehive/coordinator/placement/libmoehive_planner.so"]
    needed += ["moehive/coordinator/dispatch/libmoehive_dispatch.so", "moehive/coordinator/cli/main.py"]
    needed += ["moehive/expert_node/tiers/libmoehive_disk.so", "moehive/coordinator/bench/libmoehive_slow_link.so"]
    return wrong + [f"the wheel lacks {name}" for name in needed if name not in names]


def check_sdist(names: list[str], tracked: list[str]) -> list[str]:
    """What is wrong with an sdist of these files, its top folder taken off."""
    there = set(names)
    wrong = [f"the sdist lacks {name}" for name in tracked if name not in there and not name.startswith(".ci/")]
    return wrong + [f"the sdist holds {name}" for name in names if name.startswith((".venv", "build/", ".ci"))]


def main() -> int:
    """1 when something is wrong, which is printed."""
    dist, tracked = Path(sys.argv[1]), Path(sys.argv[2]).read_text().splitlines()
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wrong = check_wheel([name for name in wheel.namelist() if not name.endswith("/")])
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        wrong += check_sdist([name.partition("/")[2] for name in sdist.getnames()], tracked)
    print("\n".join(wrong) or "sdist and wheel hold what they should")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
