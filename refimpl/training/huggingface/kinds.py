"""What a path given for weights is: a Hugging Face folder, or else a checkpoint; and what to do where it is neither."""

from __future__ import annotations

import os
import re
from pathlib import Path

from refimpl.errors import UsageError
from refimpl.training.checkpoint import FILE_NAME
from refimpl.training.huggingface.config_json import ADAPTER, CONFIG, is_hugging_face, read_table
from refimpl.training.huggingface.files import FILE, INDEX

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_START = 512  # bytes of a file that show whether it is a text: a safetensors file begins with a length, which has zero bytes
GIVE = f"give a {FILE_NAME}, the folder of a run, or a Hugging Face folder"


def is_model_folder(path: Path) -> bool:
    """Return whether `path` is the folder of a Hugging Face model; False for what `checkpoint.load` reads or refuses.

    Errors: UsageError for what cannot be read, and for what users take for one: a name on the hub, a text, an adapter, a folder
    whose config.json is damaged or missing.
    """
    try:
        os.stat(path)
        if not path.is_dir():
            _refuse_text(path)
            return False
        names = set(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        _refuse_hub_name(path)
        return False
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    if FILE_NAME in names:
        return is_hugging_face(path)
    if ADAPTER in names and not names & {FILE, INDEX}:
        raise UsageError(
            f"{path} has {ADAPTER}, an adapter without its model: merge it into its model first, with "
            "model.merge_and_unload().save_pretrained(NEW_FOLDER), and give that folder"
        )
    if CONFIG in names:
        read_table(path / CONFIG)
    elif names & {FILE, INDEX}:
        raise UsageError(f"{path} has Hugging Face weights, but not the {CONFIG} that belongs to them: download it too")
    return is_hugging_face(path)


def _refuse_hub_name(path: Path) -> None:
    name = str(path)
    if _HUB_NAME.fullmatch(name) and path.suffix != ".safetensors" and ("/" not in name or not path.parent.exists()):
        raise UsageError(
            f"there is no {name}, no checkpoint at that path and no folder. If it is a name on the Hugging Face Hub: nothing "
            f"is downloaded here; `hf download {name} --local-dir DIR` of the package huggingface_hub makes a folder"
        )


def _refuse_text(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(_START)
    if not start or b"\0" in start:
        return
    if start.startswith(b"version https://git-lfs"):
        raise UsageError(f"{path} is a Git LFS pointer, not the file itself: get the file with git lfs pull")
    try:
        start[:-4].decode()  # the last character may be cut
    except UnicodeDecodeError:
        return
    folder = f"give its folder, {path.parent}" if path.suffix == ".json" else GIVE
    raise UsageError(f"{path} is not a valid safetensors file but a text, no checkpoint: {folder}")
