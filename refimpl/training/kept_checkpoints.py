"""The checkpoints of a run that are kept beside its last one (`--keep`), and the space that they need on its disk.

    checkpoint.safetensors          the last one, always, since --resume continues from it
    best.safetensors                of 'best': the one with the lowest validation loss
    checkpoint-STEP.safetensors     of a number N: the last N

Where the file system has hard links, what is kept is at first another name of `checkpoint.safetensors`: it takes no time, and
no space until the next checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from refimpl.errors import UsageError, nearest
from refimpl.training.checkpoint import FILE_NAME, write_atomically

BEST = "best.safetensors"
_NUMBERED = re.compile(r"checkpoint-([1-9][0-9]*)\.safetensors")


@dataclass(frozen=True)
class Keep:
    """The checkpoints to keep beside the last one. numbered: how many of the last ones have their step in their name."""

    best: bool = False
    numbered: int = 0

    @classmethod
    def of(cls, text: str) -> Keep:
        """Return what --keep says: 'last', 'best', a number, or several of them with commas. Errors: UsageError."""
        words = [word.strip() for word in text.split(",")]
        others = [word for word in words if word not in ("best", "last")]
        for word in others:
            if not re.fullmatch("[1-9][0-9]{0,8}", word):
                guess = nearest(word, ("best", "last"))
                raise UsageError(f"--keep has {word!r:.60}: give best, last or a number, as in best,last,3{guess}")
        if len(others) > 1:
            raise UsageError(f"--keep is {text!r:.60}: give one number, that of the last checkpoints to keep")
        return cls("best" in words, int(others[0]) if others else 0)

    def number(self, folder: Path, step: int) -> None:
        """Keep the checkpoint of a step under its number, and delete those beyond the last N. Errors: UsageError.

        Those of later steps are from before the run was resumed from an earlier checkpoint: they are deleted too.
        """
        if not self.numbered:
            return
        keep(folder, f"checkpoint-{step}.safetensors")
        present = sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NUMBERED.fullmatch(path.name)))
        valid = [path for at, path in present if at <= step][-self.numbered :]
        for _, path in present:
            if path not in valid:
                path.unlink(missing_ok=True)

    def least_space(self, folder: Path, size: int, saves: int) -> int:
        """Return the bytes that a run will need on its disk beyond its present checkpoints.

        size: bytes of a checkpoint. saves: how many will be written. A new one is complete before an old one is deleted.
        """
        present = len({path.stat().st_ino for path in kept_in(folder)})
        most = max(1, self.numbered) + self.best + 1
        return size * max(0, min(most, present + saves) - present)


def kept_in(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints in the folder of a run."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in (FILE_NAME, BEST) or _NUMBERED.fullmatch(path.name):
            yield path


def keep(folder: Path, name: str) -> None:
    """Keep the last checkpoint of a run under another name. Errors: UsageError if it cannot be written."""
    source, path = folder / FILE_NAME, folder / name
    if path.exists() and path.samefile(source):  # renaming one name of a file to another does nothing
        return
    write_atomically(path, lambda temporary: _link_or_copy(source, temporary))


def _link_or_copy(source: Path, path: Path) -> None:
    path.unlink(missing_ok=True)
    with suppress(OSError):  # a file system without hard links
        os.link(source, path)
        return
    shutil.copyfile(source, path)


def require_space(folder: Path, needed: int) -> None:
    """Raise UsageError unless the disk of a folder has that many free bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UsageError(
            f"the disk of {folder} has {free:,} bytes free, but the checkpoints of this run need {needed:,}, "
            "with a new one complete before an old one is deleted: free some, or name another --out"
        )
