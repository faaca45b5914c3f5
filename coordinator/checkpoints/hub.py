"""A model's name into files on this machine: a path as it is, a hub id by download.

An id is `organization/name`, or `organization/name:Q4_K_M` to choose one of the GGUF models of a repository. Files
lie in the hub's own cache, so that other programs find them too.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    CacheNotFound,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._cache_manager import HFCacheInfo, scan_cache_dir

from ..sizes import in_bytes
from ..types import CoordinatorError
from .blob_download import Unreachable, fetch_blob
from .hub_files import HubFile, chosen_path, needed_files

log = logging.getLogger(__name__)

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?::([A-Za-z0-9._-]{{1,64}}))?")

_NOT_ALLOWED = (401, 403)

Progress = Callable[[str, int, int], None]  # a file, bytes of all files that are here now, bytes of all files


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, and which of its GGUF models; None: it has one, or safetensors."""

    repository: str
    choice: str | None


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds, at the commit that it is at."""

    revision: str
    files: list[HubFile]


def parse_id(model: str) -> HubId | None:
    """`model` as a hub id; None if it does not look like one."""
    match = _HUB_ID.fullmatch(model)
    if match is None or ".." in model:
        return None
    return HubId(match[1], match[2])


def hub_id(model: str) -> HubId | None:
    """`model` as a hub id; None for an existing path. Raises CoordinatorError for what is neither.

    Anything that looks like a path is never sent to the hub.
    """
    with contextlib.suppress(OSError):  # a name too long is no path, and no hub id
        if Path(model).expanduser().exists():
            return None
    wanted = parse_id(model)
    if wanted is None:
        raise CoordinatorError(
            f"There is no model directory {model}; give a directory with config.json and safetensors, a GGUF file, or"
            " a hub id like organization/name."
        )
    return wanted


def resolve(model: str) -> Path:
    """The directory or GGUF file of `model`: an existing path, else the download of a hub id.

    Offline, what is cached is used. Raises CoordinatorError, one sentence.
    """
    wanted = hub_id(model)
    return Path(model).expanduser() if wanted is None else pull(wanted, lambda name, done, total: None)


def pull(wanted: HubId, progress: Progress) -> Path:
    """Downloads what is missing of a hub's model, and only what is needed of it; its directory, or GGUF file.

    Weights resume in the middle of a file and are checked by their SHA-256 before they count. Raises
    CoordinatorError, one sentence.
    """
    name = wanted.repository
    with in_words(name):
        found = listing(wanted)
        if found is None:
            return cached(wanted)
        chosen = needed_files(name, found.files, wanted.choice, lambda file: Path(hf_hub_download(name, file)))
        _fetch(name, found.revision, _repository(name) / "blobs", chosen, progress)
        patterns = [re.sub(r"([*?\[])", r"[\1]", file.name) for file in chosen]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    return chosen_path(folder, name, wanted.choice)


def listing(wanted: HubId) -> Listing | None:
    """A repository's files; None if the hub can't be reached. Raises the hub's errors, see `in_words`."""
    try:
        info = HfApi().model_info(wanted.repository, files_metadata=True)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return None
    except HfHubHTTPError:
        raise
    except Exception as error:  # httpx's errors: no route, no name, a time-out
        if not type(error).__module__.startswith(("httpx", "httpcore")):
            raise
        return None
    files = [
        HubFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs is not None else None)
        for each in info.siblings or ()
    ]
    return Listing(info.sha or "main", files)


def cache() -> HFCacheInfo | None:
    """What the hub's cache holds; None if there is none."""
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _fetch(name: str, revision: str, blobs: Path, files: list[HubFile], progress: Progress) -> None:
    large = [file for file in files if file.sha256 is not None]
    missing = [file for file in large if not (blobs / str(file.sha256)).exists()]
    blobs.mkdir(parents=True, exist_ok=True)
    total = sum(file.size for file in large)
    need, free = sum(file.size for file in missing), shutil.disk_usage(blobs).free
    if need > free:
        raise CoordinatorError(
            f"{name} needs {in_bytes(need)} more, but the disk of {blobs} has {in_bytes(free)} left; make room,"
            " or set HF_HOME to another disk."
        )
    done = total - need
    for file in missing:
        log.info("Downloading %s of %s, %s", file.name, name, in_bytes(file.size))
        before = done

        def report(got: int, file: HubFile = file, before: int = before) -> None:
            progress(file.name, before + got, total)

        fetch_blob(hf_hub_url(name, file.name, revision=revision), blobs, file, report)
        done += file.size
    progress("", total, total)


def cached(wanted: HubId) -> Path:
    """What the cache has of a model when the hub can't be asked; whoever opens it says what is missing.

    Raises CoordinatorError if it has nothing.
    """
    home = _repository(wanted.repository)
    with contextlib.suppress(OSError):
        folder = home / "snapshots" / (home / "refs" / "main").read_text().strip()
        if folder.is_dir():
            return chosen_path(folder, wanted.repository, wanted.choice)
    raise CoordinatorError(
        f"There is no directory {wanted.repository}, and the hub cannot be reached to download it; check the network,"
        " or give a directory."
    )


def _repository(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")


@contextlib.contextmanager
def in_words(model: str) -> Iterator[None]:
    """Turns the hub's errors into CoordinatorError, one sentence."""
    try:
        yield
    except GatedRepoError as error:
        raise CoordinatorError(
            f"{model} is gated on the hub: accept its terms there, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CoordinatorError(
            f"There is neither a directory {model} nor such a model on the hub; check the name, or log in with"
            " `hf auth login` if it is private."
        ) from error
    except Unreachable as error:
        raise CoordinatorError(
            f"The download of {model} broke off ({error}); run it again, and it goes on."
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CoordinatorError(
            f"The hub cannot be reached for {model}; check the network, and run it again."
        ) from error
    except HfHubHTTPError as error:
        advice = "log in with `hf auth login`" if error.response.status_code in _NOT_ALLOWED else "try again later"
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise CoordinatorError(f"The hub refused {model} ({reason}); {advice}.") from error
    except OSError as error:  # disk full, no permission on the cache
        raise CoordinatorError(
            f"{model} cannot be downloaded: {error.strerror or error}; look at {constants.HF_HUB_CACHE}, or set"
            " HF_HOME to another disk."
        ) from error
