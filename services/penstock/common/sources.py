"""Where a model's files come from: a folder, the model that ships in the package, or the Hugging Face hub."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from pathlib import Path
from typing import NoReturn

from penstock.common.service import StartError

__all__ = ["BUILTIN", "BUILTIN_FOLDER", "default_name", "resolve"]

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent / "builtin_model"

_HUB_ID = re.compile(r"(?P<repository>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?", re.ASCII)

# Names, so that neither code nor pickled weights are ever fetched.
_FETCHED = [
    "*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]
# Folders hold other formats of the same weights, and `consolidated` files hold them under their authors' names.
_NOT_FETCHED = ["*/*", "consolidated*.safetensors"]


def resolve(model: str) -> Path:
    """The local folder that holds a model's files, fetched from the hub where need be.

    A fetch that was cut short goes on where it stopped, and shows a progress bar where stderr is a terminal. The hub's own settings
    hold: ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.

    Args:
        model: a folder, ``builtin``, or a hub id such as ``Qwen/Qwen3-0.6B``, of which ``Qwen/Qwen3-0.6B@REVISION`` is one branch,
            tag or commit (its main branch without). A folder of that name wins over the other two.

    Raises:
        StartError: there is no such model, or it can not be fetched; one line that says why and what to do.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder.resolve()
    if folder.is_file():
        raise StartError(f"{model} is a file; give the folder that holds config.json and the .safetensors files")
    if model == BUILTIN:
        return BUILTIN_FOLDER
    if not model or model[0] in "/.~" or model.endswith("/"):
        raise StartError(f"no folder {model or '(empty name)'}; give a model's folder, a Hugging Face hub id, or {BUILTIN!r}")
    hub_id = _HUB_ID.fullmatch(model)
    if hub_id is None:
        raise StartError(
            f"{model!r} is neither a folder nor a Hugging Face hub id (OWNER/NAME or OWNER/NAME@REVISION), nor {BUILTIN!r}"
        )
    return _fetch(hub_id["repository"], hub_id["revision"])


def default_name(model: str) -> str:
    """What clients call a model that was given no name: a folder's own, or the hub's id without its revision."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.resolve().name
    hub_id = _HUB_ID.fullmatch(model)
    return hub_id["repository"] if hub_id else model


def _fetch(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # public, but not marked as exported

    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else disable_progress_bars():
            fetched = Path(snapshot_download(model, revision=revision, allow_patterns=_FETCHED, ignore_patterns=_NOT_FETCHED))
    except Exception as error:  # noqa: BLE001 - whatever the hub's client raises is told in one line
        _refuse(model, revision, error)
    if not any(fetched.glob("*.safetensors")):
        raise StartError(f"{model} on the hub holds no .safetensors weights; pickled weights (.bin, .pt) are never loaded")
    return fetched


def _refuse(model: str, revision: str | None, error: Exception) -> NoReturn:
    from huggingface_hub import constants, errors

    # Subclasses before what they derive from.
    match error:
        case errors.GatedRepoError():
            reason = f"{model} is gated: accept its terms at {constants.ENDPOINT}/{model} and set HF_TOKEN"
        case errors.RevisionNotFoundError():
            reason = f"{model} has no revision {revision!r} on the hub"
        case errors.RepositoryNotFoundError():
            reason = (
                f"no folder {model}, and no such model on {constants.ENDPOINT} that this token may read; "
                "check the name, and set HF_TOKEN for a private one"
            )
        case errors.HfHubHTTPError() if error.response.status_code in {401, 403}:
            reason = f"the hub refuses {model} (HTTP {error.response.status_code}); set HF_TOKEN to a token that may read it"
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | errors.IncompleteSnapshotError():
            state = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} can not be reached"
            reason = f"no folder {model}, the local cache does not hold all of it, and {state}"
        case errors.HFValidationError():
            reason = f"{model!r} is neither a folder nor a Hugging Face hub id: {_first_line(error)}"
        case OSError() if error.errno is not None:
            reason = f"can not write {model} to {constants.HF_HUB_CACHE}: {error.strerror}"
        case _:
            reason = f"can not fetch {model} from {constants.ENDPOINT}: {_first_line(error)}"
    meant = f"; did you mean {BUILTIN!r}?" if difflib.get_close_matches(model, [BUILTIN]) else ""
    raise StartError(reason + meant) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
