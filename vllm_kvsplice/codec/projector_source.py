# SPDX-License-Identifier: Apache-2.0
"""Finds the projector of an engine: the setting, else beside the model's weights, else none (the int8 default)."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

from vllm_kvsplice.codec.projector import FILE_NAME, Projector
from vllm_kvsplice.errors import KVSpliceError

# Inside a model folder or repo, in this order. vLLM reads every *.safetensors at a model's top as weights, unless an index
# lists the real ones; a folder below is out of its reach.
PLACES = (f"kvsplice/{FILE_NAME}", FILE_NAME)
WEIGHT_INDEX = "model.safetensors.index.json"

logger = logging.getLogger("vllm.kvsplice")


@lru_cache(maxsize=1)
def for_engine(setting: str | None, model: str, revision: str | None, log: bool = True) -> Projector | None:
    """The projector that ``locate`` finds, read once for all layers of a load; ``forget`` frees it. None: the default.

    ``log``: say which, once; for one worker of an engine.
    """
    level = logging.INFO if log else logging.DEBUG
    path = locate(setting, model, revision)
    if path is None:
        logger.log(
            level,
            "kvsplice: no projector (no setting, no %s in the model's folder): K and V are rotated int8, near lossless. For a "
            "smaller cache: `kvsplice calibrate %s --out FILE`, then --additional-config.kvsplice.projector FILE",
            PLACES[0],
            model,
        )
        return None
    projector = Projector.load(path)
    made = projector.metadata
    logger.log(
        level, "kvsplice: projector %s (preset %s, made for %s)", path, made.preset, made.model_name or "no name"
    )
    return projector


def forget() -> None:
    """Drop what ``for_engine`` holds: all layers have taken their part, and a reload shall read the file anew."""
    for_engine.cache_clear()


def locate(setting: str | None, model: str, revision: str | None = None) -> Path | None:
    """Path of the projector file, or None if there is none and nobody asked for one.

    Args:
        setting: file, folder or Hugging Face repo id; KVSpliceError if nothing is there. None: look beside the weights.
        model: the model as vLLM was given it, a folder, a file or a repo id. revision: of the model's repo.
    """
    if setting is None:
        return _beside(model, revision)
    path = Path(setting).expanduser()
    if path.is_dir():
        return _inside(path) or path / FILE_NAME  # Projector.load says that it does not exist
    if path.exists() or not _is_repo_id(setting):
        return path
    found, error = _from_hub(setting, None)
    if found is None:
        raise KVSpliceError(
            f"projector {setting!r} is neither a file here nor a Hugging Face repo that holds {FILE_NAME} ({_reason(error)}): "
            "make one with `kvsplice calibrate MODEL --out FILE`."
        )
    return found


def check_beside(model: str) -> None:
    """Refuse a projector that lies where vLLM will take it for weights; to be asked before weights are loaded."""
    folder = Path(model)
    if (folder / FILE_NAME).is_file() and not (folder / WEIGHT_INDEX).exists():
        raise KVSpliceError(
            f"vLLM would read {folder / FILE_NAME} as weights of the model, which has no {WEIGHT_INDEX}: move it with "
            f"`mkdir -p {folder}/kvsplice && mv {folder / FILE_NAME} {folder}/kvsplice/`."
        )


def _beside(model: str, revision: str | None) -> Path | None:
    path = Path(model)
    if path.exists():
        return _inside(path if path.is_dir() else path.parent)
    if not _is_repo_id(model):
        return None
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    found, error = _from_hub(model, revision)
    # A repo that the hub does not know was found elsewhere by vLLM; a file that it does not know is a plain no.
    if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError | EntryNotFoundError):
        raise KVSpliceError(
            f"the hub did not say whether {model} holds a {FILE_NAME} ({_reason(error)}): set "
            "--additional-config.kvsplice.projector FILE, or HF_HUB_OFFLINE=1 to serve from the local cache alone."
        )
    return found


def _inside(folder: Path) -> Path | None:
    return next((folder / place for place in PLACES if (folder / place).is_file()), None)


def _is_repo_id(text: str) -> bool:
    return text.count("/") <= 1 and not text.startswith((".", "/", "~")) and not text.endswith(".safetensors")


def _from_hub(repo: str, revision: str | None) -> tuple[Path | None, Exception | None]:
    """The file from the hub or its cache, or None with the error of the last try."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    last: Exception | None = None
    for place in PLACES:
        try:
            return Path(hf_hub_download(repo, place, revision=revision)), None
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
            last = error
            reached = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
            if not (reached or constants.HF_HUB_OFFLINE):
                break  # the repo, not the file, is out of reach: asking again costs half a minute of retries
    return None, last


def _reason(error: Exception | None) -> str:
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:120].rstrip('. ')}"
