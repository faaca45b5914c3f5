"""A model's name into a directory on this machine: a path as it is, a hub id by download."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..types import CoordinatorError

# What a checkpoint needs; pickles, other frameworks' weights and documents stay away.
_PATTERNS = ["*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.txt"]
_IGNORED = ["*/*"]  # variants and originals in folders of their own

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")


def resolve(model: str) -> Path:
    """The directory of `model`: an existing directory, else the download of a hub id `organization/name`.

    Downloads resume and are kept in the hub's cache; offline, what is cached is used. Raises CoordinatorError, one
    sentence. Anything that looks like a path is never sent to the hub.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(model) is None or ".." in model:
        raise CoordinatorError(
            f"There is no model directory {model}; give a directory with config.json and safetensors, a GGUF file, or"
            " a hub id like organization/name."
        )
    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS, ignore_patterns=_IGNORED))
    except GatedRepoError as error:
        raise CoordinatorError(
            f"{model} is gated on the hub: accept its terms there, then log in with `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise CoordinatorError(f"There is neither a directory {model} nor such a model on the hub.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise CoordinatorError(
            f"There is no directory {model}, and the hub cannot be reached to download it; check the network, or give"
            " a directory."
        ) from error
    except HfHubHTTPError as error:
        raise CoordinatorError(f"The hub refused {model}: {str(error).splitlines()[0]}") from error
    except OSError as error:  # connection refused, disk full, no permission on the cache
        raise CoordinatorError(f"{model} cannot be downloaded: {error.strerror or error}.") from error
