"""The small files beside a model's weights, which say how model and tokenizer are used. A run keeps those that it began with.

    RUN/model/config.json, generation_config.json, tokenizer_config.json, special_tokens_map.json, chat_template.jinja

So a run can be exported when the folder that it began with is gone, and so can a run that began with this one.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from refimpl.errors import UsageError
from refimpl.training.checkpoint import write_bytes_atomically
from refimpl.training.huggingface.config_json import CONFIG, is_hugging_face

KEPT = "model"
"""The folder of these files in the folder of a run."""
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
OF_TOKENIZER = ("special_tokens_map.json", "chat_template.jinja", TOKENIZER_CONFIG)
FILES = (CONFIG, GENERATION, *OF_TOKENIZER)


def kept_by(path: Path) -> Path | None:
    """Return the folder with the small files of a Hugging Face model, or of a run that began with one; None without any."""
    folder = path if path.is_dir() else path.parent
    return next((place for place in (folder, folder / KEPT) if is_hugging_face(place)), None)


def read_files(path: Path | None) -> dict[str, bytes]:
    """Return the small files of the model or run at `path`, by name. Errors: UsageError for one that cannot be read."""
    folder = None if path is None else kept_by(path)
    return {} if folder is None else {name: read_file(folder / name) for name in FILES if (folder / name).is_file()}


def read_file(path: Path) -> bytes:
    """Return the contents of a file. Errors: UsageError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error


def keep(files: dict[str, bytes], run: Path) -> None:
    """Write small files to the folder of a new run, in place of those of a run before it. Errors: UsageError."""
    folder = run / KEPT
    try:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        with suppress(OSError):  # there is none, or it has other files
            folder.rmdir()
        if files:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --out {run}: {error.strerror}") from error
    for name, contents in files.items():
        write_bytes_atomically(folder / name, contents)
